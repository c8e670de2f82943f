from __future__ import annotations

import gzip
import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.shards import ShardReader
from megatron_spice.corpus.tokenizer import TextTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_corpus.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("preprocess_corpus", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    before = signal.getsignal(signal.SIGTERM)
    yield load_tool()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["The river runs to the sea."] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run(tool, model_dir: Path, tmp_path: Path):
    """The tool with the test's tokenizer and output, run in this process; its exit code."""

    def call(*arguments: object) -> int:
        fixed = ["--tokenizer", model_dir, "--output", tmp_path / "corpus", "--min-tokens", 2]
        return tool.main([str(argument) for argument in [*arguments, *fixed]])

    return call


def jsonl(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def documents(folder: Path, model_dir: Path) -> list[tuple[str, str]]:
    """(source, text) of every passage."""
    corpus = Corpus(folder, TextTokenizer.from_dir(model_dir), verify=True)
    passages = [corpus.passage(index) for index in range(len(corpus))]
    return [(passage.source, passage.text) for passage in passages]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "partial" in path.name]


def test_all_kinds_of_input_end_up_in_one_corpus(run, tmp_path: Path, model_dir: Path) -> None:
    data = tmp_path / "data"
    first = {"text": "First text.", "source": "s", "id": 7}
    jsonl(data / "a.jsonl", first, "\n", {"text": "  \n"}, {"text": "Second."})
    jsonl(data / "deep" / "b.jsonl.gz", {"text": "Third text."})
    (data / "deep" / "c.txt").write_bytes(b"\xef\xbb\xbfFourth text.\n")
    (data / "ignored.csv").write_text("x")
    os.symlink(data, data / "deep" / "loop")
    assert run(data, data / "*.jsonl", data / "a.jsonl") == 0
    assert documents(tmp_path / "corpus", model_dir) == [
        ("s", "First text."),
        ("a", "Second."),
        ("b", "Third text."),
        ("c", "Fourth text.\n"),
    ]
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["skipped"] == {"empty_documents": 1}
    assert leftovers(tmp_path) == []


def test_shards_hold_the_documents_as_the_model_s_tokenizer_gives_them(
    run, tmp_path: Path, model_dir: Path
) -> None:
    texts = ["The river. " * 40, "x", "The sea is <|end|> here."]
    assert run(jsonl(tmp_path / "a.jsonl", *[{"text": text} for text in texts]), "--max-tokens", 16) == 0
    library = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    library.encode_special_tokens = True
    reader = ShardReader(tmp_path / "corpus" / "shard_00000")
    assert [reader.document(n).tolist() for n in range(len(reader))] == [library.encode(text).ids for text in texts]
    assert "".join(text for _, text in documents(tmp_path / "corpus", model_dir)) == texts[0] + texts[2]


def test_source_labels_override(run, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = jsonl(tmp_path / "a.jsonl", {"text": "First text.", "source": "own"})
    b = jsonl(tmp_path / "b.jsonl", {"text": "Second text."})
    assert run(a, b, "--source", "x", "--source", "y", "--source", "z") == 2
    assert "3 --source labels for 2 inputs" in capsys.readouterr().err
    assert run(a, b, "--source", "x", "--source", "y") == 0
    assert documents(tmp_path / "corpus", model_dir) == [("x", "First text."), ("y", "Second text.")]


BROKEN = [
    ("not json\n", "not JSON"),
    ("[1]\n", "a JSON list"),
    ('{"txt": "a"}\n', "no string under `text` (keys: txt)"),
    ('{"text": 3}\n', "no string under `text`"),
    ('{"text": "a", "source": 3}\n', "`source` is a int"),
    ('{"text": "\\ud800"}\n', "half of a surrogate pair"),
    ("[" * 100_000 + "\n", "nested too deep"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_a_broken_line_is_named_and_left_out(
    run, tmp_path: Path, model_dir: Path, line: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "First text."}, line, {"text": "Second text."})
    assert run(path, "--strict") == 2
    assert f"{path}:2: {reason}" in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists() and leftovers(tmp_path) == []
    assert run(path) == 0
    printed = capsys.readouterr()
    assert f"{path}:2: {reason}" in printed.err
    assert "1 bad lines" in printed.out
    assert [text for _, text in documents(tmp_path / "corpus", model_dir)] == ["First text.", "Second text."]


def test_bytes_that_are_no_text_and_damaged_files(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good one"}\n{"text": "\xff"}\n{"text": "nul \x00 raw"}\n')
    (tmp_path / "b.txt").write_bytes(b"line\n\xff")
    whole = jsonl(tmp_path / "c.jsonl.gz", *[{"text": os.urandom(40).hex()} for _ in range(500)]).read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "c.jsonl.gz") == 0
    errors = capsys.readouterr().err
    assert "a.jsonl:2: not UTF-8" in errors
    assert "a.jsonl:3: not JSON: Invalid control character" in errors
    assert "b.txt:2: not UTF-8" in errors
    assert "the compressed file is damaged from here on" in errors


def test_the_same_command_again_does_nothing_and_another_is_refused(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "First text."})
    assert run(path) == 0
    manifest = tmp_path / "corpus" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    assert run(path) == 0
    assert "already there" in capsys.readouterr().out
    assert run(path, "--max-tokens", 100) == 2
    assert "different options" in capsys.readouterr().err
    jsonl(path, {"text": "Another text."})
    assert run(path) == 2
    assert "different inputs" in capsys.readouterr().err
    assert manifest.stat().st_mtime_ns == written
    manifest.unlink()
    assert run(path) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere.jsonl", "no such file"),
        (lambda folder: jsonl(folder / "a.csv", "x"), "is none of"),
        (lambda folder: jsonl(folder / "d" / "a.csv", "x").parent, "holds none of"),
        (lambda folder: jsonl(folder / "empty.jsonl"), "no passage in 1 input file"),
        (lambda folder: jsonl(folder / "short.jsonl", {"text": "x"}), "of them 1 under --min-tokens 2"),
    ],
)
def test_inputs_that_give_nothing_are_errors(
    run, tmp_path: Path, make, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(make(tmp_path)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists() and leftovers(tmp_path) == []


def test_impossible_settings(run, tmp_path: Path, tool, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "First text."})
    assert run(path, "--max-tokens", 1) == 2
    assert "--min-tokens 2 and --max-tokens 1" in capsys.readouterr().err
    assert tool.main([str(path), "--tokenizer", str(tmp_path), "--output", str(tmp_path / "corpus")]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
