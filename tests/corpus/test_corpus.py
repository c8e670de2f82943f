from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.corpus.build import Request, build_corpus
from megatron_spice.corpus.build_options import BuildOptions
from megatron_spice.corpus.corpus import Corpus
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.manifest import sha256
from megatron_spice.corpus.passages import PASSAGE_DTYPE, PassageWriter, open_passages
from megatron_spice.corpus.shard_table import open_shards
from megatron_spice.corpus.sampler import PassageSampler, draw
from megatron_spice.corpus.tokenizer import TextTokenizer

TEXTS = [f"Document {number} is about the river.\n\n" + "It runs to the sea. " * number for number in range(1, 30)]


def make(folder: Path, tokenizer: TextTokenizer, shard_tokens: int = 700) -> Path:
    folder.mkdir(exist_ok=True)
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text, "source": f"s{n % 2}"}) + "\n" for n, text in enumerate(TEXTS)))
    options = BuildOptions(max_tokens=64, min_tokens=4, shard_tokens=shard_tokens)
    build_corpus(Request([InputFile(source, "texts")], tokenizer, folder / "corpus", options))
    return folder / "corpus"


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Path:
    return make(tmp_path_factory.mktemp("made"), tokenizer)


@pytest.fixture
def own_corpus_dir(tmp_path: Path, tokenizer: TextTokenizer) -> Path:
    return make(tmp_path, tokenizer)


def test_passages_put_the_documents_together_again(corpus_dir: Path, tokenizer: TextTokenizer) -> None:
    corpus = Corpus(corpus_dir, tokenizer, open_shards=1, verify=True)
    assert corpus.manifest.shards > 2
    by_document: dict[int, str] = {}
    for index in range(len(corpus)):
        passage = corpus.passage(index)
        assert passage.index == index
        assert len(passage.token_ids) <= 64
        assert passage.text == tokenizer.decode(passage.token_ids)
        assert passage.source == f"s{passage.document % 2}"
        by_document[passage.document] = by_document.get(passage.document, "") + passage.text
    assert [by_document[number] for number in sorted(by_document)] == TEXTS


def test_the_manifest_counts_what_is_there(corpus_dir: Path, tokenizer: TextTokenizer) -> None:
    corpus = Corpus(corpus_dir, tokenizer)
    manifest = corpus.manifest
    assert manifest.documents == len(TEXTS) == sum(open_shards(corpus_dir / "shards.npy")["documents"])
    assert manifest.tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert manifest.passages == len(corpus) == sum(source["passages"] for source in manifest.sources)
    assert {source["name"]: source["documents"] for source in manifest.sources} == {"s0": 15, "s1": 14}


def test_a_missing_corpus_names_the_tool(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"no corpus at .*preprocess_corpus\.py"):
        Corpus(tmp_path / "nowhere", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        Corpus(tmp_path, tokenizer)


def test_another_tokenizer_is_refused(corpus_dir: Path, other_tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"another tokenizer .* --tokenizer"):
        Corpus(corpus_dir, other_tokenizer)


@pytest.mark.parametrize("name", ["shard_00001.bin", "shard_00000.idx", "passages.npy", "shards.npy", "sources.npy"])
def test_damage_is_noticed(own_corpus_dir: Path, tokenizer: TextTokenizer, name: str) -> None:
    path = own_corpus_dir / name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Corpus(own_corpus_dir, tokenizer, verify=True)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{name} has {len(whole) - 1} bytes"):
        Corpus(own_corpus_dir, tokenizer)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Corpus(own_corpus_dir, tokenizer)


def test_a_broken_manifest_is_refused(own_corpus_dir: Path, tokenizer: TextTokenizer) -> None:
    path = own_corpus_dir / "manifest.json"
    whole = path.read_text()
    for broken in ("{", "[]", "", json.dumps({"format": 2}), whole.replace('"s0"', '"s9"'), whole + " "):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"manifest\.json cannot be read: it"):
            Corpus(own_corpus_dir, tokenizer)


@pytest.mark.parametrize(("number", "version"), [(1, "an earlier"), (99, "another")])
def test_other_formats_are_refused(own_corpus_dir: Path, tokenizer: TextTokenizer, number: int, version: str) -> None:
    path = own_corpus_dir / "manifest.json"
    path.write_text(json.dumps({"format": number, "command": ["tools/preprocess_corpus.py", "my texts"]}))
    again = rf"made by {version} version .* again with: tools/preprocess_corpus\.py 'my texts'"
    with pytest.raises(ValueError, match=again):
        Corpus(own_corpus_dir, tokenizer)


def test_a_manifest_with_other_keys_is_refused(own_corpus_dir: Path, tokenizer: TextTokenizer) -> None:
    path = own_corpus_dir / "manifest.json"
    body = path.read_bytes().rpartition(b',\n "sha256"')[0].replace(b'"skipped"', b'"skiped"')
    path.write_bytes(body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n')
    with pytest.raises(ValueError, match="made by another version .*skiped"):
        Corpus(own_corpus_dir, tokenizer)


def test_out_of_range_is_an_index_error(corpus_dir: Path, tokenizer: TextTokenizer) -> None:
    corpus = Corpus(corpus_dir, tokenizer)
    for index in (-1, len(corpus)):
        with pytest.raises(IndexError, match=f"passage {index} of a corpus of {len(corpus)}"):
            corpus.passage(index)


rows_of_passages = st.lists(
    st.tuples(*[st.integers(0, 2 ** (8 * PASSAGE_DTYPE[name].itemsize) - 1) for name in PASSAGE_DTYPE.names]), max_size=20
).map(lambda rows: np.array(rows, dtype=PASSAGE_DTYPE))


@given(rows=rows_of_passages)
def test_the_passage_table_is_a_plain_npy(tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("table") / "passages.npy"
    writer = PassageWriter(path)
    writer.add(rows[:7])
    writer.add(rows[7:])
    assert writer.close() == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    assert np.array_equal(np.load(path), rows)
    assert np.array_equal(open_passages(path), rows)


def test_other_tables_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(ValueError, match="not a passage table"):
        open_passages(tmp_path / "other.npy")


def test_two_ranks_and_a_resumed_run_see_the_same_order(corpus_dir: Path, tokenizer: TextTokenizer) -> None:
    corpus = Corpus(corpus_dir, tokenizer)
    uninterrupted = PassageSampler(corpus, seed=3).next(12)
    first = PassageSampler(corpus, seed=3)
    seen = first.next(5) + first.next(1)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = PassageSampler(corpus, seed=3)
    resumed.load_state_dict(state)
    assert seen + resumed.next(6) == uninterrupted
    assert PassageSampler(corpus, seed=4).next(12) != uninterrupted


def test_another_order_cannot_be_resumed(corpus_dir: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    corpus = Corpus(corpus_dir, tokenizer)
    state = PassageSampler(corpus, seed=3).state_dict()
    with pytest.raises(ValueError, match=r"seed 3, this run's has 4.*train\.seed"):
        PassageSampler(corpus, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="fingerprint"):
        PassageSampler(corpus, seed=3).load_state_dict({**state, "fingerprint": "x"})
    with pytest.raises(ValueError, match="negative"):
        PassageSampler(corpus, seed=-1)


def test_draws_are_uniform() -> None:
    size, count = 7, 7000
    counts = Counter(draw(11, position, size) for position in range(count))
    assert set(counts) == set(range(size))
    # Chi-square with 6 degrees of freedom passes 22.5 once in a thousand.
    assert sum((counts[value] - count / size) ** 2 / (count / size) for value in range(size)) < 22.5


def test_draws_are_fixed_for_ever() -> None:
    assert [draw(0, position, 10) for position in range(12)] == [8, 6, 9, 7, 1, 9, 1, 9, 9, 8, 7, 4]
    assert draw(2**63, 2**40, 1) == 0
