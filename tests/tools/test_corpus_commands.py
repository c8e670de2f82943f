"""inspect, verify and merge as a user types them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_corpus import Document, huge_corpus, make_corpus
from tiny_tokenizer import write_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import preprocess_corpus as tool  # noqa: E402

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\u202ed\x9be\n  | not ours\x00"


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The tool takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def corpus(tmp_path: Path, model: Path) -> Path:
    """Made by the tool, of texts and a label that would play tricks on a terminal."""
    texts = tmp_path / "texts.jsonl"
    records = [{"text": HOSTILE, "source": "la\x1bbel\n"}, {"text": "x" * 300, "source": "plain"}]
    texts.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "corpus"
    assert tool.main(making(output, model)) == 0
    return output


def making(output: Path, model: Path) -> list[str]:
    """The command that makes the fixture's corpus."""
    options = ["--tokenizer", model, "--output", output, "--max-tokens", 90, "--min-tokens", 2, "--verify"]
    return list(map(str, [output.with_name("texts.jsonl"), *options]))


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = tool.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_inspect_shows_what_is_there(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shown(capsys, "inspect", corpus)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{corpus}: 5 passages of 2 documents, ")
    assert "max_tokens 90, min_tokens 2" in out and "1 file, " in out
    shares = {line.split()[0]: line.split()[-1] for line in lines if line.endswith("%")}
    assert shares == {"la\\x1bbel\\n": "20.0%", "plain": "80.0%"}
    bars = [line.split() for line in lines[lines.index("passages by tokens (longest 90)") + 1 :]]
    assert sum(int(bar[3]) for bar in bars) == 5
    assert max(bars, key=lambda bar: int(bar[3]))[4] == "#" * 40


def test_nothing_hostile_reaches_the_terminal(corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shown(capsys, "inspect", corpus, "--passages", 40, "--tokenizer", model, "--seed", 3)
    assert code == 0
    assert all(character.isprintable() or character == "\n" for character in out)
    assert "  | a\\x1b[2J\\x1b]0;title\\x07b\\rc\\u202ed\\x9be\n  |   | not ours\\x00\n" in out
    assert out.count("\npassage ") == 40


def test_text_needs_the_right_tokenizer(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = shown(capsys, "inspect", corpus, "--passages", 1)
    assert code == 2 and "--passages shows text, which needs --tokenizer HF_DIR" in error
    code, _, error = shown(capsys, "inspect", corpus, "--passages", 1, "--tokenizer", tmp_path)
    assert code == 2 and "no tokenizer.json" in error
    assert shown(capsys, "inspect", tmp_path / "nowhere")[0] == 2


def test_inspect_of_many_shards_is_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shown(capsys, "inspect", huge_corpus(tmp_path / "corpus", 30_000))
    assert code == 0
    assert "30,000 shards\n" in out and "... and 29,980 more; tokens: least 1,000, most 1,000" in out
    assert len(out.splitlines()) < 60


def test_verify_names_every_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_corpus(tmp_path / "whole", [Document("a", [1] * 9)] * 9)
    broken = make_corpus(tmp_path / "broken", [Document("a", [1] * 9)] * 9)
    code, out, error = shown(capsys, "verify", whole, broken)
    assert code == 0 and error == "" and out.count("all as they were written") == 2
    for name in ("shard_00001.bin", "shard_00002.idx"):
        data = bytearray((broken / name).read_bytes())
        data[-1] ^= 1
        (broken / name).write_bytes(data)
    (broken / "sources.npy").unlink()
    code, out, error = shown(capsys, "verify", broken, whole)
    assert code == 1 and f"{broken}: 3 of 9 files damaged" in out and f"{whole}: 9 files" in out
    for part in ("sources.npy is missing", "shard_00001.bin is damaged", "shard_00002.idx is damaged"):
        assert part in error
    (broken / "manifest.json").write_text("{}")
    code, _, error = shown(capsys, "verify", broken)
    assert code == 1 and "manifest.json cannot be read" in error
    assert shown(capsys, "verify", tmp_path / "nowhere")[0] == 2


def test_a_corpus_that_is_there_is_verified_too(corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shown(capsys, *making(corpus, model))
    assert code == 0 and "already there" in out and "all as they were written" in out
    data = bytearray((corpus / "shard_00000.bin").read_bytes())
    data[5] ^= 1
    (corpus / "shard_00000.bin").write_bytes(data)
    code, out, error = shown(capsys, *making(corpus, model))
    assert code == 1 and "already there" in out and "shard_00000.bin is damaged" in error


def test_tasks_are_merged_to_the_corpus_of_one_run(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 400)
    fixed = [*tmp_path.glob("?.txt"), "--tokenizer", model, "--max-tokens", 90, "--min-tokens", 2]
    for number in range(3):
        assert shown(capsys, *fixed, "--output", tmp_path / "many", "--task", f"{number}/3")[0] == 0
    tasks = sorted((tmp_path / "many.tasks").iterdir())
    code, _, error = shown(capsys, "merge", tmp_path / "many", *tasks[:2])
    assert code == 2 and "of 3 tasks 1 are missing: 2" in error
    code, out, _ = shown(capsys, "merge", tmp_path / "many", *tasks)
    assert code == 0 and "left where made, in 3 folders" in out
    assert shown(capsys, *fixed, "--output", tmp_path / "one")[0] == 0
    texts = [shown(capsys, "inspect", tmp_path / name, "--passages", 9, "--tokenizer", model)[1] for name in ("many", "one")]
    assert texts[0].partition("passages by tokens")[2] == texts[1].partition("passages by tokens")[2] != ""
    # The merged corpus is what the command without --task makes, so that one finds it there.
    code, out, _ = shown(capsys, *fixed, "--output", tmp_path / "many")
    assert code == 0 and "already there" in out


def test_whoever_reads_it_may_stop(corpus: Path, model: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_corpus.py"), "inspect", str(corpus), "--passages", "3000"]
    with subprocess.Popen(
        [*command, "--tokenizer", str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "passages of" in process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, "")


def test_any_text_can_be_printed_in_any_locale(corpus: Path, model: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_corpus.py"), "inspect", str(corpus)]
    command += ["--passages", "9", "--tokenizer", str(model)]
    environment = {"PATH": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
