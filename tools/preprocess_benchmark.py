"""`tools/benchmark.py preprocess`: whole commands that make `.bin/.idx` of a text file, timed from start to end, in turns.

Ours is tools/preprocess_corpus.py. With `--megatron-lm`, the two scripts of that checkout beside it: preprocess_data.py with as
many workers, and preprocess_data_fast.py, both with the same tokenizer. The ceiling is a plain copy: the text read, as many bytes
as the shards have written and put on disk. Memory is that of all the command's processes, what they share counted once (PSS),
looked at ten times a second.

The text is the first `--megabytes` of distinct documents of `--texts` (examples/fetch_documentation.py makes some hundred). With
`--times`, ours also makes a corpus of that many times the size, which is about memory: in each repetition other letters stand for
the letters, so that no word is as before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import preprocess_rivals
import psutil
from benchmark_options import columns, positive, refuse

from megatron_spice import machine
from megatron_spice.cluster.children import die_with_parent

HELP = "texts to shards, against Megatron-LM's scripts"
OURS, CEILING = "tools/preprocess_corpus.py", "plain copy"
_SAMPLE_SECONDS = 0.1
_BLOCK = 8 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument("--tokenizer", nargs="+", required=True, metavar="HF_DIR", help="each is measured")
    parser.add_argument("--texts", nargs="+", default=["assets/documentation.jsonl"], metavar="FILE", help="JSON lines")
    parser.add_argument("--megabytes", type=positive, default=100, help="of text taken from them (default 100)")
    parser.add_argument("--megatron-lm", type=Path, metavar="CHECKOUT", help="a clone of NVIDIA/Megatron-LM")
    parser.add_argument("--steps", type=positive, default=3, help="runs of each command; medians are reported")
    parser.add_argument("--times", type=positive, help="also make a corpus of so many times the size, for its memory")


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each tokenizer; ends with a message when something is not there."""
    for name in options.texts:
        if not Path(name).is_file():
            refuse(f"--texts {name}: no such file; make one with: python examples/fetch_documentation.py {name}")
    for name in options.tokenizer:
        if not (Path(name) / "tokenizer.json").is_file():
            refuse(f"--tokenizer {name} has no tokenizer.json")
    if options.megatron_lm and not (options.megatron_lm / "tools" / preprocess_rivals.SCRIPTS[0]).is_file():
        refuse(f"--megatron-lm {options.megatron_lm} has no tools/{preprocess_rivals.SCRIPTS[0]}")
    return [{
        "title": Path(name).name, "ranks": 1, "threads": options.threads or machine.usable_cores(),
        "tokenizer": str(Path(name).resolve()), "texts": [str(Path(text).resolve()) for text in options.texts],
        "megabytes": options.megabytes, "steps": options.steps, "times": options.times, "seed": options.seed,
        "megatron_lm": str(options.megatron_lm.resolve()) if options.megatron_lm else None,
    } for name in options.tokenizer]  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each command: time, speed, how much longer it took than ours, memory, whether its tokens are ours."""
    rows = [("tokenizer", "command", "s", "MB/s", "time / ours", "peak MB", "same tokens")]
    for result in results:
        ours = result["commands"][OURS]["seconds"]
        for name, measured in result["commands"].items():
            same = {True: "yes", False: "no", None: ""}[measured.get("same_tokens")]
            rows.append((
                result["tokenizer"], name, f"{measured['seconds']:.2f}", f"{result['megabytes'] / measured['seconds']:.1f}",
                f"{measured['seconds'] / ours:.2f}", f"{measured['peak_mb']:.0f}", same,
            ))  # fmt: skip
        if result["large"]:
            large = result["large"]
            rows.append((
                result["tokenizer"], f"{OURS}, {large['megabytes']:.0f} MB", f"{large['seconds']:.2f}",
                f"{large['megabytes'] / large['seconds']:.1f}", "", f"{large['peak_mb']:.0f}", "",
            ))  # fmt: skip
    notes = [f"{result['tokenizer']}: {note}" for result in results for note in result["notes"]]
    first = results[0] if results else {"megabytes": 0, "documents": 0}
    return "\n".join([f"{first['megabytes']:.1f} MB of text, {first['documents']} documents", columns(rows), *notes])


def run_rank(job: dict[str, Any], result: Path) -> None:
    """Measures one job and writes the result as JSON."""
    with tempfile.TemporaryDirectory(prefix="spice-preprocess-") as folder:
        result.write_text(json.dumps(_measure(job, Path(folder))))


def _measure(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    texts = folder / "texts.jsonl"
    megabytes, documents = _take(map(Path, job["texts"]), texts, job["megabytes"])
    made = folder / "corpus"
    commands, environments, notes = _commands(job, texts, folder)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in [*commands, CEILING]}
    digests: dict[str, str] = {}
    size = 0
    for _ in range(job["steps"]):
        for name, command in commands.items():
            runs[name].append(_run(command, environments[name], folder / "log"))
            shards = sorted(made.glob("*.bin") if name == OURS else folder.glob("theirs*.bin"))
            digests[name] = _digest(shards)
            size = sum(path.stat().st_size for path in shards)
            shutil.rmtree(made, ignore_errors=True)
            for path in folder.glob("theirs*"):
                path.unlink()
        runs[CEILING].append((_copy(texts, folder / "copy", size), 0.0))
    measured = {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in values),
            "all_seconds": [seconds for seconds, _ in values],
            "peak_mb": max(peak for _, peak in values) / 1e6,
            "same_tokens": digests[name] == digests[OURS] if name in digests and name != OURS else None,
        }
        for name, values in runs.items()
    }
    large = _large(job, texts, megabytes, folder) if job["times"] else None
    return {
        "tokenizer": Path(job["tokenizer"]).name, "megabytes": megabytes, "documents": documents, "cores": job["threads"],
        "commands": measured, "large": large, "notes": notes,
    }  # fmt: skip


def _commands(job: dict[str, Any], texts: Path, folder: Path) -> tuple[dict, dict, list[str]]:
    """Command lines and environments by name, and what there is to say of them."""
    commands = {OURS: _ours(job, texts, folder / "corpus")}
    environments, notes = {OURS: _environment()}, []
    if job["megatron_lm"]:
        checkout, tokenizer = Path(job["megatron_lm"]), Path(job["tokenizer"])
        environment, added = preprocess_rivals.environment(checkout, folder, environments[OURS])
        notes += [f"Megatron-LM's environment: {', '.join(added)}"] if added else []
        for script in preprocess_rivals.SCRIPTS:
            used = tokenizer
            if script == "preprocess_data_fast.py":
                used, changed = preprocess_rivals.tokenizer_for_gigatoken(tokenizer, folder)
                notes += [f"{script} has a copy of the tokenizer: {changed}"] if changed else []
            environments[script] = environment
            commands[script] = preprocess_rivals.command(
                script, checkout, texts, folder / f"theirs-{script}", used, job["threads"]
            )
    return commands, environments, notes


def _environment() -> dict[str, str]:
    """This process's environment without what makes it a rank."""
    of_ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in of_ranks}


def _ours(job: dict[str, Any], texts: Path, output: Path) -> list[str]:
    tool = str(Path(__file__).with_name("preprocess_corpus.py"))
    return [
        sys.executable, tool, str(texts), "--tokenizer", job["tokenizer"], "--output", str(output),
        "--workers", str(job["threads"]), "--source", "texts",
    ]  # fmt: skip


def _take(sources: Iterator[Path], output: Path, megabytes: int) -> tuple[float, int]:
    """Write distinct documents until there are so many megabytes of text; their size and number.

    Raises:
        SystemExit: there are not so many.
    """
    size, seen = 0, set()
    with output.open("wb") as file:
        for source in sources:
            for line in source.open("rb"):
                text = json.loads(line)["text"].encode()
                digest = hashlib.sha256(text).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                file.write(line if line.endswith(b"\n") else line + b"\n")
                size += len(text)
                if size >= megabytes * 1e6:
                    return size / 1e6, len(seen)
    raise SystemExit(f"--megabytes {megabytes}: the texts have only {size / 1e6:.1f} MB of distinct documents")


def _run(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, float]:
    """Seconds that a command takes, and bytes of memory at its peak.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    here = os.getpid()
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, preexec_fn=lambda: die_with_parent(here)
        )
        peak, until = 0, 0.0
        while process.poll() is None:
            if time.perf_counter() >= until:
                peak = max(peak, _memory(process.pid))
                until = time.perf_counter() + _SAMPLE_SECONDS
            time.sleep(0.005)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return seconds, peak


def _memory(pid: int) -> int:
    """Bytes of a process and its children, what they share counted once."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_full_info().pss
    except psutil.Error:  # ended meanwhile
        pass
    return total


def _copy(texts: Path, output: Path, size: int) -> float:
    """Seconds to read the texts and to write `size` bytes to the disk."""
    began = time.perf_counter()
    with texts.open("rb") as source:
        while source.read(_BLOCK):
            pass
    block = bytes(_BLOCK)
    with output.open("wb") as file:
        for begin in range(0, size, _BLOCK):
            file.write(block[: size - begin])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    output.unlink()
    return seconds


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _large(job: dict[str, Any], texts: Path, megabytes: float, folder: Path) -> dict[str, float]:
    """Ours on so many times the texts, with other letters each time."""
    path = folder / "large.jsonl"
    letters = list(string.ascii_lowercase)
    generator = random.Random(job["seed"])
    with path.open("w", encoding="utf-8") as file:
        for _ in range(job["times"]):
            exchange = str.maketrans(string.ascii_lowercase, "".join(letters))
            for line in texts.open(encoding="utf-8"):
                text = json.loads(line)["text"].translate(exchange)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            generator.shuffle(letters)
    seconds, peak = _run(_ours(job, path, folder / "large"), _environment(), folder / "log")
    return {"megabytes": megabytes * job["times"], "seconds": seconds, "peak_mb": peak / 1e6}
