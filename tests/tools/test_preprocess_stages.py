"""The stages through the command line: what leaves a corpus, what is said of it, and that nothing else changes."""

from __future__ import annotations

import gzip
import importlib.util
import json
import multiprocessing
import signal
import time
from pathlib import Path

import pytest
from tiny_tokenizer import write_tokenizer

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.manifest import Manifest
from megatron_spice.corpus.tokenizer import TextTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_corpus.py"
RIVER = "The river rises in the hills north of the town. It runs 312 km to the sea, and boats use half of it. {}"
GERMAN = "Der Fluss entspringt in den Bergen und fliesst lange durch das Land, bis er endlich das Meer erreicht."
BENCHMARK = "What is the name of the old king who ruled over the seven islands before the great storm came?"


@pytest.fixture(scope="module")
def tool():
    before = signal.getsignal(signal.SIGTERM)
    spec = importlib.util.spec_from_file_location("preprocess_corpus", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"), RIVER, vocab_size=300)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Of a.jsonl and b.jsonl: 1 to 3 and 1 to 5."""
    kept = [RIVER.format(word) for word in ("First.", "Second, and that is quite another thing to say here.", "Third.")]
    others = [kept[0], GERMAN, f"Quiz night! {BENCHMARK} Nobody knew.", "", "Another text of the sea and of the hills."]
    for name, part in (("a", kept), ("b", others)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    items = [{"question": BENCHMARK, "answer": "Tamahere"}, {"question": "Who?"}]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return kept + others


@pytest.fixture
def run(tool, model_dir: Path, tmp_path: Path):
    def call(output: str, *arguments: object) -> int:
        fixed = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--tokenizer", model_dir, "--output", tmp_path / output]
        return tool.main([str(argument) for argument in [*fixed, "--min-tokens", 2, *arguments]])

    return call


def removed(folder: Path) -> list[tuple[str, int, str]]:
    lines = gzip.decompress((folder / "removed.jsonl.gz").read_bytes()).decode().splitlines()
    return [(Path(entry["path"]).name, entry["line"], entry["reason"]) for entry in map(json.loads, lines)]


def kept(folder: Path, model_dir: Path) -> list[str]:
    corpus = Corpus(folder, TextTokenizer.from_dir(model_dir), verify=True)
    return [corpus.passage(index).text for index in range(len(corpus))]


STAGES = ["--language", "en", "--language-threshold", "0.4", "--decontaminate", "quiz.jsonl", "--dedup", "exact"]
GONE = [("b.jsonl", 1, "duplicate"), ("b.jsonl", 2, "language"), ("b.jsonl", 3, "contaminated")]


def test_removed_documents_are_on_record_and_the_rest_is_the_corpus(
    run,
    texts: list[str],
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_spice.corpus.parts.SMALLEST_UNIT", 200)
    assert run("corpus", *STAGES, "--workers", 2) == 0
    printed = capsys.readouterr()
    assert "1 of the 2 items of quiz.jsonl have under 13 words: not looked for" in printed.err
    assert "1 language" in printed.out and "1 contaminated" in printed.out and "1 duplicate" in printed.out
    corpus = tmp_path / "corpus"
    assert removed(corpus) == GONE
    assert kept(corpus, model_dir) == [*texts[:3], texts[-1]]
    manifest = Manifest.read(corpus)
    assert manifest.skipped == {"language": 1, "contaminated": 1, "duplicate": 1, "empty_documents": 1}
    assert manifest.options["stages"]["dedup"] == "exact"
    assert "What is the name" not in (corpus / "manifest.json").read_text()
    assert f"{tmp_path}/a.jsonl:1" in gzip.decompress((corpus / "removed.jsonl.gz").read_bytes()).decode()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]

    assert run("corpus", *STAGES) == 0 and "already there" in capsys.readouterr().out
    assert run("corpus", *STAGES[:-2]) == 2 and "different options" in capsys.readouterr().err
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": BENCHMARK, "answer": "another"}) + "\n")
    assert run("corpus", *STAGES) == 2 and "different options" in capsys.readouterr().err


def test_any_number_of_workers_and_a_second_start_give_the_same(
    run, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_spice.corpus.stages import records

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_spice.corpus.parts.SMALLEST_UNIT", 200)
    stages = [*STAGES[:-1], "minhash"]
    write, started = records.UnitRecord.write, tmp_path / "started"
    started.mkdir()

    def counted(record: records.UnitRecord, number: int, folder: Path) -> None:
        (started / f"{number}-{len(list(started.iterdir()))}").touch()
        if number == 3 and not (tmp_path / "room").exists():
            raise OSError(28, "No space left on device")
        write(record, number, folder)

    monkeypatch.setattr(records.UnitRecord, "write", counted)
    assert run("one", *stages, "--workers", 1) == 1
    errors = capsys.readouterr().err
    assert "No space left on device" in errors and "what its stages have found is kept" in errors
    (tmp_path / "room").touch()
    assert run("one", *stages, "--workers", 1) == 0
    numbers = sorted(int(path.name.split("-")[0]) for path in started.iterdir())
    assert numbers.count(3) == 2 and numbers.count(0) == numbers.count(2) == 1
    assert run("three", *stages, "--workers", 3) == 0
    assert removed(tmp_path / "one") == removed(tmp_path / "three") != []
    for name in ("removed.jsonl.gz", "passages.npy", "shards.npy", "shard_00000.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_a_killed_run_is_taken_up(run, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_spice.corpus.stages import records

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_spice.corpus.parts.SMALLEST_UNIT", 200)
    write = records.UnitRecord.write

    def slow(record: records.UnitRecord, number: int, folder: Path) -> None:
        if number == 3:
            time.sleep(60)
        write(record, number, folder)

    with monkeypatch.context() as patch:
        patch.setattr(records.UnitRecord, "write", slow)
        process = multiprocessing.get_context("fork").Process(target=run, args=("corpus", *STAGES, "--workers", 2))
        process.start()
        judged, until = tmp_path / ".corpus.partial" / "stages" / "judged", time.monotonic() + 30
        while not (judged / "000002.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
        process.join()
    kept = {int(path.stem) for path in judged.glob("*.jsonl")}
    assert kept >= {0, 1, 2} and 3 not in kept
    (tmp_path / "again").mkdir()

    def told(record: records.UnitRecord, number: int, folder: Path) -> None:
        (tmp_path / "again" / str(number)).touch()
        write(record, number, folder)

    monkeypatch.setattr(records.UnitRecord, "write", told)
    assert run("corpus", *STAGES) == 0  # its worker, which sleeps in the midst of a unit, has noticed by now
    assert {int(path.name) for path in (tmp_path / "again").iterdir()} & kept == set()
    assert (tmp_path / "again" / "3").exists()
    assert removed(tmp_path / "corpus") == GONE


@pytest.mark.parametrize("dedup", ["exact", "minhash"])
def test_tasks_find_each_others_duplicates(
    run,
    tool,
    texts: list[str],
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dedup: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_spice.corpus.parts.SMALLEST_UNIT", 200)
    stages = [*STAGES[:-1], dedup]
    tasks = tmp_path / "tasks.tasks"
    for number in range(3):
        assert run("tasks", *stages, "--task", f"{number}/3") == 0
        assert ("give the same command again" in capsys.readouterr().out) == (number < 2)
        assert (tasks / f"{number:05d}" / "manifest.json").exists() == (number == 2)
    assert run("tasks", *stages[:-2], "--dedup", "exact" if dedup == "minhash" else "minhash", "--task", "0/3") == 2
    assert "is of tasks that were asked for something else: options.stages.dedup" in capsys.readouterr().err
    for number in range(3):
        assert run("tasks", *stages, "--task", f"{number}/3") == 0
    folders = [tasks / f"{number:05d}" for number in range(3)]
    assert tool.main(["merge", str(tmp_path / "tasks"), *map(str, folders)]) == 0
    assert run("one", *stages) == 0
    assert removed(tmp_path / "tasks") == removed(tmp_path / "one") != []
    assert kept(tmp_path / "tasks", model_dir) == kept(tmp_path / "one", model_dir)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "c5"], "--filter c5: there is none of this name; choose from gopher-quality"),
        (["--language", "english"], "--language english: the model knows"),
        (["--decontaminate", "nowhere.jsonl"], "--decontaminate: input nowhere.jsonl: no such file"),
        (["--filter", "gopher-quality"], "7 gopher-quality"),
    ],
)
def test_wrong_wishes_are_told_and_nothing_is_left(
    run, texts: list[str], tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run("corpus", *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
