"""The preprocessing benchmark: its texts, what the rivals get, and a small real run of ours."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import preprocess_benchmark  # noqa: E402
import preprocess_rivals  # noqa: E402

from megatron_spice.corpus.fast_encoder import _load  # noqa: E402


def texts(path: Path, documents: int) -> Path:
    """JSON lines of which every second repeats the one before."""
    with path.open("w") as file:
        for number in range(documents):
            file.write(json.dumps({"text": f"The river {number // 2} runs to the sea. " * 40}) + "\n")
    return path


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A tokenizer that lacks some bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:-3]
    tokenizer.train_from_iterator(["The river runs to the sea."], trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_only_distinct_documents_count(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts.jsonl", 4000)
    megabytes, documents = preprocess_benchmark._take(iter([source]), tmp_path / "taken.jsonl", 1)
    taken = [json.loads(line)["text"] for line in (tmp_path / "taken.jsonl").open()]
    assert len(set(taken)) == len(taken) == documents < 1000
    assert 1 <= megabytes == sum(map(len, taken)) / 1e6 < 1.01
    with pytest.raises(SystemExit, match="only 2.* MB of distinct documents"):
        preprocess_benchmark._take(iter([source]), tmp_path / "taken.jsonl", 100)


def test_ours_is_measured(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = {
        "title": "model", "ranks": 1, "threads": 2, "tokenizer": str(model_dir), "megabytes": 1, "steps": 2, "times": 3,
        "texts": [str(texts(tmp_path / "texts.jsonl", 4000))], "seed": 0, "megatron_lm": None,
    }  # fmt: skip
    preprocess_benchmark.run_rank(job, tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    ours, ceiling = (result["commands"][name] for name in (preprocess_benchmark.OURS, preprocess_benchmark.CEILING))
    assert len(ours["all_seconds"]) == 2 and ours["seconds"] > ceiling["seconds"] > 0
    assert 20 < ours["peak_mb"] < 1024 and 20 < result["large"]["peak_mb"] < 1024
    assert result["large"]["megabytes"] == pytest.approx(3 * result["megabytes"])
    lines = preprocess_benchmark.table([result]).splitlines()
    assert [line.split()[1] for line in lines[2:5]] == ["tools/preprocess_corpus.py", "plain", "tools/preprocess_corpus.py,"]


def test_a_command_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('the last words')"]
    with pytest.raises(RuntimeError, match="the last words"):
        preprocess_benchmark._run(command, dict(os.environ), tmp_path / "log")


def test_gigatoken_takes_the_rival_s_copy_of_a_tokenizer(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(Exception, match="byte"):
        _load((model_dir / "tokenizer.json").read_text())
    copy, changed = preprocess_rivals.tokenizer_for_gigatoken(model_dir, tmp_path)
    assert copy != model_dir and changed.startswith("3 bytes") and not (copy / "model.safetensors").exists()
    ids = _load((copy / "tokenizer.json").read_text()).encode("The river")
    assert ids.tolist() == Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode("The river").ids
    again, changed = preprocess_rivals.tokenizer_for_gigatoken(copy, tmp_path)
    assert (again, changed) == (copy, None)


def test_a_page_is_fetched_as_its_text(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("fetch_documentation", ROOT / "examples" / "fetch_documentation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = tmp_path / "page.html"
    page.write_text("<head><title>t</title></head><script>x()</script><h1>Seas &amp; rivers</h1><p>They\n run.</p><p>" + "a " * 150)
    line = json.loads(module.documents([page], "test")[0])
    assert line["source"] == "test"
    assert line["text"].splitlines()[0] == "Seas & rivers"
    assert "x()" not in line["text"] and "title" not in line["text"] and "<" not in line["text"]
    page.write_text("<p>short</p>")
    assert module.documents([page], "test") == []
