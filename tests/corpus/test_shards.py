"""Our shard files against Megatron-Core's own reader and writer, both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_spice.corpus.manifest import sha256
from megatron_spice.corpus.shard_table import ShardTotals, shard_bytes
from megatron_spice.corpus.shards import ShardReader, ShardWriter, ids_dtype

DTYPES = ["uint16", "int32"]
documents_of_ids = st.lists(st.lists(st.integers(0, 60000), max_size=30), min_size=1, max_size=12).filter(
    lambda documents: any(documents)  # Megatron cannot map an empty .bin
)
fresh_each_time = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)


def write(prefix: Path, documents: list[list[int]], dtype: str) -> ShardTotals:
    writer = ShardWriter(prefix, np.dtype(dtype))
    assert [writer.add(np.array(ids, dtype=np.int64)) for ids in documents] == list(range(len(documents)))
    return writer.close()


@pytest.mark.parametrize("dtype", DTYPES)
@given(documents=documents_of_ids)
@fresh_each_time
def test_the_files_are_megatron_s_byte_for_byte(tmp_path: Path, documents: list[list[int]], dtype: str) -> None:
    totals = write(tmp_path / "ours", documents, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for ids in documents:
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (totals.documents, totals.tokens) == (len(documents), sum(map(len, documents)))
    sizes = shard_bytes(totals.documents, totals.tokens, np.dtype(dtype))
    for suffix, digest in ((".bin", totals.bin_sha256), (".idx", totals.idx_sha256)):
        ours = (tmp_path / f"ours{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()
        assert len(ours) == sizes[suffix]
        assert digest.hex() == sha256(tmp_path / f"theirs{suffix}")


@given(documents=documents_of_ids, cut=st.integers(0, 12))
@fresh_each_time
def test_many_documents_at_once_are_the_same_as_one_by_one(tmp_path: Path, documents: list[list[int]], cut: int) -> None:
    one_by_one = write(tmp_path / "one", documents, "uint16")
    writer = ShardWriter(tmp_path / "many", np.dtype("uint16"))
    for number, some in ((0, documents[:cut]), (min(cut, len(documents)), documents[cut:])):
        flat = np.array([token for ids in some for token in ids], dtype=np.uint32)
        assert writer.add_many(flat, [len(ids) for ids in some]) == number
    assert writer.close() == one_by_one
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"many{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@given(documents=documents_of_ids)
@fresh_each_time
def test_megatron_reads_what_we_write(tmp_path: Path, documents: list[list[int]], dtype: str) -> None:
    write(tmp_path / "shard", documents, dtype)
    theirs, ours = IndexedDataset(str(tmp_path / "shard")), ShardReader(tmp_path / "shard")
    assert len(theirs) == len(ours) == len(documents)
    for number, ids in enumerate(documents):
        assert theirs[number].tolist() == ours.document(number).tolist() == ids
        assert theirs[number].dtype == ours.document(number).dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(documents=st.lists(documents_of_ids, min_size=1, max_size=6))
@fresh_each_time
def test_megatron_s_documents_of_sentences_are_read_whole(
    tmp_path: Path, documents: list[list[list[int]]], dtype: str
) -> None:
    """As its preprocess_data.py writes them with --split-sentences: several sequences a document."""
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for sentences in documents:
        flat = [token for ids in sentences for token in ids]
        builder.add_document(torch.tensor(flat, dtype=torch.int64), [len(ids) for ids in sentences])
    builder.finalize(str(tmp_path / "theirs.idx"))
    reader = ShardReader(tmp_path / "theirs")
    found = [reader.document(number).tolist() for number in range(len(reader))]
    assert found == [[token for ids in sentences for token in ids] for sentences in documents]
    assert reader.dtype == np.dtype(dtype)


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "many.bin"), dtype=np.int32)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_item(torch.tensor([7]))
    builder.add_item(torch.tensor([8, 9]))
    builder.end_document()
    builder.end_document()  # a document of no sequence
    builder.finalize(str(tmp_path / "many.idx"))
    reader = ShardReader(tmp_path / "many")
    assert [reader.document(number).tolist() for number in range(len(reader))] == [[0, 1, 2, 3, 4], [7, 8, 9], []]


def test_a_view_is_read_only_and_has_no_copy(tmp_path: Path) -> None:
    write(tmp_path / "shard", [[1, 2, 3]], "uint16")
    reader = ShardReader(tmp_path / "shard")
    with pytest.raises(ValueError, match="read-only"):
        reader.document(0)[0] = 9
    assert np.shares_memory(reader.document(0), reader.document(0))
    with pytest.raises(IndexError, match="document 1 of a shard of 1"):
        reader.document(1)


def test_an_empty_shard_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "shard", [], "uint16")
    assert len(ShardReader(tmp_path / "shard")) == 0


@pytest.mark.parametrize(("suffix", "keep"), [("bin", -2), ("idx", -1), ("idx", 20), ("idx", 0)])
def test_a_cut_file_is_refused(tmp_path: Path, suffix: str, keep: int) -> None:
    write(tmp_path / "shard", [[1, 2, 3], [4]], "uint16")
    path = tmp_path / f"shard.{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"shard\.{suffix} is cut short"):
        ShardReader(tmp_path / "shard")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"shard\.idx"):
        ShardReader(tmp_path / "shard")
    write(tmp_path / "shard", [[1, 2, 3]], "uint16")
    (tmp_path / "shard.idx").write_bytes(b"x" * 200)
    with pytest.raises(ValueError, match="no index of Megatron"):
        ShardReader(tmp_path / "shard")


def test_ids_that_do_not_fit_are_not_cut_to_fit(tmp_path: Path) -> None:
    assert ids_dtype(49152) == np.uint16 and ids_dtype(65500) == np.int32
    writer = ShardWriter(tmp_path / "shard", np.dtype("uint16"))
    with pytest.raises(ValueError, match="from 1 to 70000 do not fit uint16"):
        writer.add(np.array([1, 70000]))
    writer.abandon()
