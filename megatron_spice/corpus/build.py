"""Makes a corpus folder from texts: in parts, by several processes, in bounded memory, and so that nothing is lost.

    inputs -> units -> parts, each made by a worker and renamed when whole -> tables joined, shards renamed -> the folder renamed

Whoever sees the output folder sees a whole corpus. Whatever ends a run (a signal, a full disk, a killed worker) leaves the
finished parts in the workspace beside it, and the same request goes on with them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_spice.corpus import bad_lines, removed
from megatron_spice.corpus.bad_lines import read_bad_lines
from megatron_spice.corpus.build_options import BadInput, BuildOptions
from megatron_spice.corpus.combine import Piece, combine
from megatron_spice.corpus.fast_encoder import Encoder, HuggingFaceEncoder
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.manifest import Manifest
from megatron_spice.corpus.parts import COUNTS, PartMaker, deal, share_of
from megatron_spice.corpus.stages import StageOptions, prepare
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.corpus.units import ReadOptions, Unit
from megatron_spice.corpus.workers import make_parts
from megatron_spice.corpus.workspace import STAGES, shared_folder, workspace


@dataclass
class BuildProgress:
    """What a build has done so far, earlier runs included: `disk_bytes` of `total_bytes` of the inputs are read."""

    total_bytes: int = 0
    disk_bytes: int = 0
    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    passages: int = 0


@dataclass(frozen=True)
class Request:
    """A corpus to be made: all that decides what comes out.

    `task` (i, n): only the i-th of n runs of the inputs, for several machines.
    """

    inputs: Sequence[InputFile]
    tokenizer: TextTokenizer
    output: Path
    options: BuildOptions = field(default_factory=BuildOptions)
    reading: ReadOptions = field(default_factory=ReadOptions)
    task: tuple[int, int] | None = None
    stages: StageOptions = field(default_factory=StageOptions)

    def described(self) -> dict:
        """The request as JSON, to tell whether another is the same."""
        return {
            "tokenizer": {"hash": self.tokenizer.vocab_hash, "vocab_size": self.tokenizer.vocab_size},
            "options": {
                **dataclasses.asdict(self.options),
                **dataclasses.asdict(self.reading),
                "stages": self.stages.describe(),
            },
            "task": list(self.task) if self.task else None,
            "inputs": [file.identity() for file in self.inputs],
        }


def build_corpus(
    request: Request,
    *,
    encoder: Encoder | None = None,
    workers: int = 1,
    command: Sequence[str] = (),
    on_progress: Callable[[BuildProgress], None] = lambda progress: None,
    on_bad_line: Callable[[str], None] = lambda message: None,
    on_step: Callable[[str, int, int], None] = lambda step, done, total: None,
    say: Callable[[str], None] = lambda message: None,
    strict: bool = False,
    restart: bool = False,
) -> Manifest:
    """Write the corpus of `request` into its output folder, which must not exist or be empty.

    Args:
        encoder: gives the tokenizer's ids, see encoder_check.py; the tokenizer itself if there is none.
        on_progress: called several times a second.
        on_bad_line: called with `FILE:LINE: reason` for lines left out, when the part that had them is finished.
        on_step, say: as `on_progress` and `say` of `stages.prepare`, which comes before the parts.
        restart: throw away what an unfinished run has left.

    Raises:
        BadInput: no passage came out; ValueError: (strict) a line is broken, or an input is otherwise at fault.
        Unfinished: an unfinished run is in the way.
        OSError, WorkerLost: the corpus could not be written; finished parts are kept.
        NotAllJudged: a task that finds duplicates has done what it can before the others have.
    """
    output = request.output
    if output.exists() and any(output.iterdir()):
        raise BadInput(f"{output} is not empty; delete it or give another --output")
    described = request.described()
    everything = deal(request.inputs, request.reading)
    mine = share_of(len(everything), request.task or (0, 1))
    units = everything[mine.start : mine.stop] or [Unit(())]  # a corpus has at least one part, which may be empty
    with workspace(output, {**described, "parts": len(units)}, restart=restart) as folder:
        encoder = encoder or HuggingFaceEncoder(request.tokenizer)
        stages = None
        if request.stages:
            apart = request.task and not request.stages.dedup
            stages = prepare(
                units if apart else everything, request.stages, _stage_folder(request, described, folder), workers,
                mine=None if apart else mine, reading=request.reading, strict=strict, on_progress=on_step, say=say,
            )  # fmt: skip
        maker = PartMaker(folder, units, request.tokenizer, encoder, request.options, request.reading, strict, stages)
        _make_missing(maker, workers, on_progress, on_bad_line)
        pieces = [Piece.read(maker.path(number)) for number in range(len(units))]
        manifest = _finish(request, described, pieces, folder, list(command))
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def same_request(manifest: Manifest, request: Request) -> list[str]:
    """In what an existing corpus differs from what is asked for; nothing: it is the same."""
    wanted = request.described()
    wanted["tokenizer"], tokenizer = wanted["tokenizer"]["hash"], manifest.tokenizer["hash"]
    have = {"tokenizer": tokenizer, "options": manifest.options, "task": manifest.task, "inputs": manifest.inputs}
    return [name for name, want in wanted.items() if have[name] != want]


def _stage_folder(request: Request, described: dict, workspace_folder: Path) -> Path:
    """Where stages keep what they find: in the workspace, or in one place for all tasks that look for duplicates together."""
    if not (request.task and request.stages.dedup):
        return workspace_folder / STAGES
    return shared_folder(request.output.parent / STAGES, {**described, "task": None})


def _make_missing(
    maker: PartMaker, workers: int, on_progress: Callable[[BuildProgress], None], on_bad_line: Callable[[str], None]
) -> None:
    """Make the parts that no earlier run has finished, or (strict) has finished without their broken lines."""
    total = sum(unit.disk_bytes for unit in maker.units)
    before = np.zeros(len(COUNTS), dtype=np.int64)
    missing = []
    for number, unit in enumerate(maker.units):
        manifest = Manifest.read(maker.path(number)) if maker.is_finished(number) else None
        if manifest is None or (maker.strict and manifest.skipped.get("bad_lines")):
            missing.append(number)
        else:
            before += [unit.disk_bytes, 0, manifest.documents, manifest.tokens, manifest.passages]

    def on_tick(counts: np.ndarray) -> None:
        on_progress(BuildProgress(total, **dict(zip(COUNTS, (before + counts).tolist()))))

    on_tick(np.zeros(len(COUNTS), dtype=np.int64))
    for number in make_parts(maker, missing, workers, len(COUNTS), on_tick):
        for message in read_bad_lines(maker.path(number)):
            on_bad_line(message)


def _finish(request: Request, described: dict, pieces: list[Piece], folder: Path, command: list[str]) -> Manifest:
    """Join the parts and move the whole to its place."""
    whole = folder / "corpus"
    whole.mkdir(exist_ok=True)
    skipped = sum((Counter(piece.manifest.skipped) for piece in pieces), Counter())
    if not any(piece.manifest.passages for piece in pieces) and not request.task:
        for piece in pieces:
            shutil.rmtree(piece.path)
        whole.rmdir()
        raise BadInput(_why_empty(request, sum(piece.manifest.documents for piece in pieces), skipped))
    manifest = combine(whole, pieces, adopt=True)
    for name in (bad_lines.FILE_NAME, removed.FILE_NAME):
        join_records(whole, [piece.path for piece in pieces], name)
    told = {key: described[key] for key in ("options", "inputs", "task")}
    manifest = dataclasses.replace(manifest, **told, command=command)
    manifest.write(whole)
    _sync(whole)
    os.rename(whole, request.output)
    _sync(request.output.parent)
    return manifest


def join_records(output: Path, parts: Sequence[Path], name: str) -> None:
    """What parts have recorded in files of this name becomes one file, in their order; none if none has."""
    found = [part / name for part in parts if (part / name).exists()]
    if found:
        with open(output / name, "wb") as joined:
            for path in found:
                with open(path, "rb") as record:
                    shutil.copyfileobj(record, joined)


def _sync(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_empty(request: Request, documents: int, skipped: Counter[str]) -> str:
    files = len(request.inputs)
    told = ("short_documents", "empty_documents", "bad_lines")
    taken = "".join(f", {count} {reason}" for reason, count in skipped.items() if reason not in told)
    return (
        f"no passage in {files} input file{'s' * (files != 1)}: {documents} documents, of them "
        f"{skipped['short_documents']} under --min-tokens {request.options.min_tokens}; "
        f"{skipped['empty_documents']} empty, {skipped['bad_lines']} broken lines{taken}"
    )
