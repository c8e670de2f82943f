"""Corpora as they come out of the workers: the tokenizer's ids, whatever the encoder, the workers and the parts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_spice.corpus import parts
from megatron_spice.corpus.build import Request, build_corpus
from megatron_spice.corpus.build_options import BadInput, BuildOptions
from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.fast_encoder import GigatokenEncoder
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.manifest import Manifest
from megatron_spice.corpus.tokenizer import TextTokenizer
from megatron_spice.corpus.workspace import Unfinished, workspace_path

SMOLLM2 = Path(__file__).parents[2] / "assets" / "smollm2-135m-instruct"
HARD = ["<|im_end|>", "<think>", "\x04", "\u00e9", "  ", "\n\n", ". ", "\U0001f600", "\u088f", "\0", "It's 1957. ", "\u6771\u4eac\u3002"]
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(HARD), max_size=30)
documents = st.lists(st.tuples(texts.map("".join), st.sampled_from("ab")), min_size=1, max_size=12)
anew = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SMALLEST_UNIT", 500)
    monkeypatch.setattr(parts, "BLOCK_DOCUMENTS", 3)


@pytest.fixture(scope="module")
def smollm2() -> TextTokenizer:
    if not SMOLLM2.is_dir():
        pytest.skip("no SmolLM2 (python examples/fetch_assets.py model assets/smollm2-135m-instruct)")
    return TextTokenizer.from_dir(SMOLLM2)


def jsonl(folder: Path, *lines: object) -> list[InputFile]:
    """The lines as two files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [line if isinstance(line, str) else json.dumps({"text": line[0], "source": line[1]}) for line in lines]
    files = []
    for name, some in (("1.jsonl", written[: len(written) // 2]), ("2.jsonl", written[len(written) // 2 :])):
        (folder / name).write_text("".join(line + "\n" for line in some))
        files.append(InputFile(folder / name, "other"))
    return files


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which holds paths and times, and what is in that of the rest."""
    manifest = Manifest.read(folder)
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    return {**kept, "": repr((manifest.sources, manifest.options, manifest.skipped, manifest.tokens)).encode()}


@pytest.mark.parametrize("name", ["tokenizer", "smollm2"])
@given(lines=documents, shard_tokens=st.sampled_from([40, 1 << 30]))
@anew
def test_megatron_reads_the_tokenizer_s_ids_whatever_the_encoder_and_the_workers(
    name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, lines: list, shard_tokens: int
) -> None:
    tokenizer = request.getfixturevalue(name)
    folder = tmp_path_factory.mktemp("made")
    lines.append(("The river rises in the hills. " * 5, "b"))
    inputs, options = jsonl(folder, *lines), BuildOptions(max_tokens=24, min_tokens=2, shard_tokens=shard_tokens)
    build_corpus(Request(inputs, tokenizer, folder / "slow", options), workers=3)
    encoder = GigatokenEncoder(tokenizer)
    build_corpus(Request(inputs, tokenizer, folder / "fast", options), encoder=encoder, workers=1)
    assert contents(folder / "slow") == contents(folder / "fast")

    kept = [(text, source) for text, source in lines if text.strip()]
    prefixes = sorted(str(path)[:-4] for path in (folder / "fast").glob("*.bin"))
    found = [ids for prefix in prefixes for ids in _documents(prefix)]
    assert found == [tokenizer.encode(text) for text, _ in kept]

    corpus = Corpus(folder / "fast", tokenizer, verify=True)
    passages = [corpus.passage(index) for index in range(len(corpus))]
    assert all(2 <= len(passage.token_ids) <= 24 for passage in passages)
    for passage in passages:
        assert passage.source == kept[passage.document][1]
    for number, ids in enumerate(found):
        of_document = [passage.token_ids for passage in passages if passage.document == number]
        if len(ids) >= 2:
            assert sum(of_document, ()) == tuple(ids)


def _documents(prefix: str) -> list[list[int]]:
    if Path(f"{prefix}.bin").stat().st_size == 0:  # Megatron cannot map it; documents of no token
        return [[] for _ in range((Path(f"{prefix}.idx").stat().st_size - 42) // 20)]
    dataset = IndexedDataset(prefix)
    return [dataset[number].tolist() for number in range(len(dataset))]


LINES = [(f"Document {number} is about the river. " * (1 + number % 5), "ab"[number % 2]) for number in range(60)]


def test_tasks_make_the_corpus_between_them(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    inputs, options = jsonl(tmp_path, *LINES), BuildOptions(max_tokens=30, min_tokens=2)
    build_corpus(Request(inputs, tokenizer, tmp_path / "whole", options))
    shards = []
    for number in range(3):
        manifest = build_corpus(Request(inputs, tokenizer, tmp_path / f"task{number}", options, task=(number, 3)))
        assert manifest.task == [number, 3] and manifest.documents > 5
        shards += [path.read_bytes() for path in sorted((tmp_path / f"task{number}").glob("*.bin"))]
    assert shards == [path.read_bytes() for path in sorted((tmp_path / "whole").glob("*.bin"))]
    nothing = build_corpus(Request(inputs, tokenizer, tmp_path / "nothing", options, task=(0, 5000)))
    assert (nothing.documents, nothing.shards, nothing.tokenizer) == (0, 0, manifest.tokenizer)


def test_broken_lines_come_in_the_order_of_the_inputs(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    lines: list = list(LINES)
    for place in (50, 33, 12):
        lines[place] = "{broken \x1b[2J" + "x" * 2000
    inputs, told = jsonl(tmp_path, *lines), []
    request = Request(inputs, tokenizer, tmp_path / "corpus", BuildOptions(min_tokens=2))
    manifest = build_corpus(request, workers=3, on_bad_line=told.append)
    places = [("1.jsonl", 13), ("2.jsonl", 4), ("2.jsonl", 21)]
    written = (tmp_path / "corpus" / "bad_lines.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in written] == [f"{tmp_path / name}:{line}" for name, line in places]
    assert sorted(told) == sorted(written)
    assert "\x1b" not in "".join(told) and max(map(len, told)) < 600
    assert manifest.skipped["bad_lines"] == 3
    for _ in range(4):  # the workers' race has another end each time
        with pytest.raises(ValueError, match=r"1\.jsonl:13: "):
            build_corpus(Request(inputs, tokenizer, tmp_path / "strict", request.options), workers=3, strict=True)
    assert not (tmp_path / "strict").exists()


def test_an_unfinished_run_is_not_mixed_with_another(
    tokenizer: TextTokenizer, other_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    lines: list = list(LINES)
    lines[40] = "{broken"
    inputs, output, options = jsonl(tmp_path, *lines), tmp_path / "corpus", BuildOptions(min_tokens=2)
    with pytest.raises(ValueError, match=r"2\.jsonl:11"):
        build_corpus(Request(inputs, tokenizer, output, options), strict=True)
    kept = sorted(path.name for path in workspace_path(output).glob("part_*"))
    assert len(kept) > 3 and not any("unfinished" in name for name in kept)

    for other, what in (
        (Request(inputs, tokenizer, output, BuildOptions(min_tokens=3)), r"options\.min_tokens \(before: 2, now: 3\)"),
        (Request(inputs, other_tokenizer, output, options), r"tokenizer\.hash"),
        (Request(inputs[:1], tokenizer, output, options), r"inputs \(before: 2, now: 1\)"),
        (Request(inputs, tokenizer, output, options, task=(0, 2)), "task"),
    ):
        with pytest.raises(Unfinished, match=f"{what}.* --restart"):
            build_corpus(other)
    told: list[tuple] = []
    manifest = build_corpus(
        Request(inputs, tokenizer, output, options), on_progress=lambda p: told.append((p.disk_bytes, p.documents))
    )
    assert told[0][0] > 0 and told[0][1] > 0, "what was there did not count"
    assert told[-1] == (sum(file.path.stat().st_size for file in inputs), manifest.documents)
    build_corpus(Request(inputs, tokenizer, tmp_path / "at once", options), workers=2)
    assert contents(output) == contents(tmp_path / "at once")
    assert not workspace_path(output).exists()


def test_strict_does_not_pass_over_what_an_earlier_run_left_out(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = jsonl(tmp_path, *LINES[:20], "{broken", *LINES[20:])
    request = Request(inputs, tokenizer, tmp_path / "corpus", BuildOptions(min_tokens=2))
    with monkeypatch.context() as patched:
        patched.setattr("megatron_spice.corpus.build.combine", lambda *_, **__: (_ for _ in ()).throw(OSError("no more")))
        with pytest.raises(OSError, match="no more"):
            build_corpus(request)
    with pytest.raises(ValueError, match=r"1\.jsonl:21: not JSON"):
        build_corpus(request, strict=True)
    assert build_corpus(request).skipped["bad_lines"] == 1


def test_a_disk_that_fills_up_at_the_very_end_loses_nothing(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, options = jsonl(tmp_path, *LINES), BuildOptions(min_tokens=2)
    build_corpus(Request(inputs, tokenizer, tmp_path / "at once", options))
    request = Request(inputs, tokenizer, tmp_path / "corpus", options)
    rename = os.rename
    for allowed in (1, 2, 3):  # shard files that still move to their place before the disk is full
        left = [allowed]

        def rename_some(source: object, target: object, left: list[int] = left) -> None:
            if str(target).endswith((".bin", ".idx")):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
            rename(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", rename_some)
            with pytest.raises(OSError, match="No space left"):
                build_corpus(request)
        assert not request.output.exists()
    build_corpus(request)
    assert contents(request.output) == contents(tmp_path / "at once")


def test_restart_throws_away_what_was_left(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    inputs, output = jsonl(tmp_path, *LINES[:40], "{broken", *LINES), tmp_path / "corpus"
    with pytest.raises(ValueError, match="jsonl"):
        build_corpus(Request(inputs, tokenizer, output, BuildOptions(min_tokens=2)), strict=True)
    assert list(workspace_path(output).glob("part_*"))
    manifest = build_corpus(Request(inputs, tokenizer, output, BuildOptions(min_tokens=3)), restart=True)
    assert manifest.options["min_tokens"] == 3 and manifest.documents == 100


def test_two_runs_do_not_make_one_corpus(tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_spice.corpus.workspace._PATIENCE", 0.2)
    request = Request(jsonl(tmp_path, *LINES), tokenizer, tmp_path / "corpus", BuildOptions(min_tokens=2))
    workspace_path(request.output).mkdir()
    with open(workspace_path(request.output) / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unfinished, match=r"another run is making .*corpus"):
            build_corpus(request)
    assert build_corpus(request).documents == len(LINES)


def test_nothing_to_make_leaves_nothing(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    request = Request(jsonl(tmp_path, ("x", "a"), (" ", "a"), "{"), tokenizer, tmp_path / "corpus")
    with pytest.raises(BadInput, match="no passage in 2 input files: 1 documents, of them 1 under .*; 1 empty, 1 broken"):
        build_corpus(request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "2.jsonl"]


def test_an_input_that_changes_meanwhile_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    request = Request(jsonl(tmp_path, *LINES), tokenizer, tmp_path / "corpus", BuildOptions(min_tokens=2))

    class Meddler:
        """Encodes, and appends to an input at the first block."""

        name = "meddler"

        def encode(self, block: list[str]) -> object:
            with open(request.inputs[1].path, "a") as file:
                file.write("\n")
            return GigatokenEncoder(tokenizer).encode(block)

    with pytest.raises(ValueError, match=r"2\.jsonl was changed"):
        build_corpus(request, encoder=Meddler())
    assert not request.output.exists()


def test_counts_are_those_of_the_documents(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    request = Request(jsonl(tmp_path, *LINES), tokenizer, tmp_path / "corpus", BuildOptions(max_tokens=16, min_tokens=3))
    manifest = build_corpus(request, workers=2)
    lengths = {source: [len(tokenizer.encode(text)) for text, own in LINES if own == source] for source in "ab"}
    for entry in manifest.sources:
        assert (entry["documents"], entry["tokens"]) == (30, sum(lengths[entry["name"]]))
    assert np.sum([entry["passages"] for entry in manifest.sources]) == manifest.passages
