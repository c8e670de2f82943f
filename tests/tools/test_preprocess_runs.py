"""The command as a process that meets what happens to processes: signals, lost workers, full disks."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tiny_tokenizer import write_tokenizer

from megatron_spice.corpus.manifest import Manifest

TOOLS = Path(__file__).parents[2] / "tools"
SLOW = ["--tokenizer-backend", "huggingface", "--workers", "2"]
# The command with small parts, so that a few megabytes of text make many.
DRIVER = """
import sys
from megatron_spice.corpus import parts
sys.path.insert(0, {tools!r})
import preprocess_corpus
parts.SMALLEST_UNIT = 1 << 18
sys.exit(preprocess_corpus.main(sys.argv[1:]))
""".format(tools=str(TOOLS))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"), "The river runs to the sea.", vocab_size=300)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 8 MB of JSON lines, 30 parts, some seconds of work for the slow backend."""
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    sentence = "The river {n} runs to the sea, {n} km to the south. "
    with path.open("w") as file:
        for number in range(8000):
            file.write(json.dumps({"text": sentence.format(n=number) * 20, "source": f"s{number % 3}"}) + "\n")
    return path


@pytest.fixture
def command(texts: Path, model_dir: Path, tmp_path: Path) -> list[str]:
    return [sys.executable, "-c", DRIVER, str(texts), "--tokenizer", str(model_dir), "--output", str(tmp_path / "corpus")]


@pytest.fixture(scope="module")
def uninterrupted(texts: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "corpus"
    fixed = ["--tokenizer", str(model_dir), "--output", str(output), "--workers", "1"]
    subprocess.run([sys.executable, "-c", DRIVER, str(texts), *fixed], check=True, capture_output=True)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    manifest = Manifest.read(folder)
    return {**kept, "": repr((manifest.sources, manifest.documents, manifest.tokens, manifest.inputs)).encode()}


def finished(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".corpus.partial").glob("part_?????"))


@pytest.fixture
def begun(command: list[str], tmp_path: Path) -> Iterator[subprocess.Popen]:
    """The command at work, with a first part finished."""
    # What a shell runs in the background ignores SIGINT, and so do its children: these tests too.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen([*command, *SLOW], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    until = time.monotonic() + 60
    while not finished(tmp_path) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


def check_resumed(command: list[str], folder: Path, uninterrupted: Path, done: list[str]) -> None:
    """The same command goes on and makes what a run makes that nobody interrupted."""
    assert 0 < len(done) < len(list(uninterrupted.glob("*.bin"))) and not (folder / "corpus").exists()
    written = {part: (folder / ".corpus.partial" / part / "shard_00000.bin").stat().st_mtime_ns for part in done}
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert contents(folder / "corpus") == contents(uninterrupted)
    assert [path.name for path in folder.iterdir()] == ["corpus"]
    kept = {part: (folder / "corpus" / f"shard_{part[5:]}.bin").stat().st_mtime_ns for part in done}
    assert kept == written, "finished parts were made again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_was(
    begun: subprocess.Popen, command: list[str], tmp_path: Path, uninterrupted: Path, number: int
) -> None:
    workers = psutil.Process(begun.pid).children()
    assert len(workers) == 2
    begun.send_signal(number)
    code = begun.wait(30)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers)
    if number != signal.SIGKILL:
        message = begun.stderr.read()
        assert f"{len(finished(tmp_path))} finished parts are kept" in message and "Traceback" not in message
    check_resumed(command, tmp_path, uninterrupted, finished(tmp_path))


def test_a_killed_worker_is_told_of(
    begun: subprocess.Popen, command: list[str], tmp_path: Path, uninterrupted: Path
) -> None:
    os.kill(psutil.Process(begun.pid).children()[0].pid, signal.SIGKILL)
    assert begun.wait(30) == 1
    message = begun.stderr.read()
    assert "the worker that made part" in message and "SIGKILL, most often because memory ran out" in message
    assert "try fewer --workers" in message and "finished parts are kept" in message and "Traceback" not in message
    check_resumed(command, tmp_path, uninterrupted, finished(tmp_path))


def test_a_file_that_cannot_grow_ends_the_run_and_the_next_goes_on(
    command: list[str], tmp_path: Path, uninterrupted: Path
) -> None:
    largest = max(path.stat().st_size for path in uninterrupted.glob("*.bin")) - 2  # a late part's shard does not fit

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    made = subprocess.run([*command, *SLOW], capture_output=True, text=True, preexec_fn=limit, check=False)
    assert made.returncode == 1
    assert "File too large" in made.stderr and "Traceback" not in made.stderr
    assert not (tmp_path / "corpus").exists()
    check_resumed(command, tmp_path, uninterrupted, finished(tmp_path))


def in_mount(options: str) -> Callable[[list[str], Path], subprocess.CompletedProcess]:
    """Runs a command where a folder is a tmpfs with these options, in a mount namespace that ends with it."""
    unshare = shutil.which("unshare")
    probe = [unshare, "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if not unshare or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here (unshare -rm)")

    def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
        folder.mkdir()
        script = 'mount -t tmpfs -o "$1" tmpfs "$2"; shift 2; "$@"; code=$?; find "$OUT" -name "corpus*"; exit $code'
        wrapped = [unshare, "-rm", "sh", "-c", script, "sh", options, str(folder), *command]
        environment = {**os.environ, "OUT": str(folder)}
        return subprocess.run(wrapped, capture_output=True, text=True, check=False, env=environment)

    return run


@pytest.mark.parametrize(
    ("options", "message"), [("size=2m", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_full_or_read_only_disk_is_told_of(command: list[str], tmp_path: Path, options: str, message: str) -> None:
    run = in_mount(options)
    output = tmp_path / "disk"
    made = run([*command[:-1], str(output / "corpus")], output)
    assert made.returncode == 1, made.stderr
    assert message in made.stderr and "Traceback" not in made.stderr
    assert f"there is no {output / 'corpus'} yet" in made.stderr
    assert made.stdout == "", "something that looks whole is there"


def test_the_bar_shows_speed_documents_tokens_and_time_left(command: list[str]) -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))  # rows, columns
    process = subprocess.Popen([*command, *SLOW], stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    shown = b""
    with suppress(OSError), open(controller, "rb", buffering=0) as screen:  # the error is how a terminal ends
        while data := screen.read(4096):
            shown += data
    assert process.wait(30) == 0
    assert re.search(rb"\d+%\|.*\| [\d.]+M/[\d.]+M \[\d\d:\d\d<\d\d:\d\d, +[\d.]+MB/s, [\d,]+ documents, [\d.]+M tokens\]", shown)


def test_memory_does_not_grow_with_the_corpus(model_dir: Path, tmp_path: Path) -> None:
    """Texts without end of random words, the worst for the encoder's cache: all processes together stay bounded."""
    words = [os.urandom(3).hex() for _ in range(50_000)]
    with (tmp_path / "random.jsonl").open("w") as file:
        for number in range(20_000):
            begin = number * 7919 % 49_000
            text = " ".join(word[number % 4 :] + word[: number % 5] for word in words[begin : begin + 250])
            file.write(json.dumps({"text": text}) + "\n")
    tool = [sys.executable, str(TOOLS / "preprocess_corpus.py"), str(tmp_path / "random.jsonl"), "--workers", "2"]
    process = subprocess.Popen(
        [*tool, "--tokenizer", str(model_dir), "--output", str(tmp_path / "corpus")], stdout=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, proportional_bytes(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0
    assert 30e6 < peak < 600e6


def proportional_bytes(pid: int) -> int:
    """Memory of a process and its children, what they share counted once."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:  # ended meanwhile
        pass
    return total
