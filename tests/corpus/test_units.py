"""Units are a pure function of the inputs, and reading all of them is reading the files, whatever the target."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_spice.corpus.documents import InputChanged, ReadOptions
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.units import Unit, read_unit, split_into_units

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=40)
targets = st.integers(1, 3000)
quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(path: Path, values: list[str]) -> InputFile:
    """The texts in a file of the format that its name tells, in a folder of its own."""
    path = Path(tempfile.mkdtemp(dir=path.parent)) / path.name
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"other": range(len(values)), "text": pa.array(values, pa.string())}), path, 7)
    elif path.suffix == ".arrow":
        table = pa.table({"text": pa.array(values, pa.large_string()), "tags": [["a"]] * len(values)})
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    else:
        data = "".join(json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) + "\n" for text in values).encode()
        compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, lambda same: same)
        path.write_bytes(compress(data))
    return InputFile(path, "label")


def read_all(units: list[Unit], options: ReadOptions = ReadOptions()) -> tuple[list, list[str]]:
    documents, broken = [], []
    for unit in units:
        reader = read_unit(
            pickle.loads(pickle.dumps(unit)), lambda *bad: broken.append("{}:{}: {}".format(*bad)), options
        )
        documents += reader
        assert reader.disk_bytes == unit.disk_bytes
    return documents, broken


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"])
@quick
@given(values=texts, target=targets)
def test_all_units_together_are_the_file(tmp_path: Path, name: str, values: list[str], target: int) -> None:
    file = write(tmp_path / name, values)
    units = split_into_units([file], target)
    documents, broken = read_all(units)
    assert broken == []
    assert [document.text for document in documents] == values
    assert [document.line for document in documents] == list(range(1, len(values) + 1))
    assert units == split_into_units([file], target)


@quick
@given(lines=st.lists(st.integers(0, 200), max_size=60), target=st.integers(50, 3000))
def test_json_lines_are_cut_near_the_target(tmp_path: Path, lines: list[int], target: int) -> None:
    file = write(tmp_path / "a.jsonl", ["x" * length for length in lines])
    spans = [unit.spans[0] for unit in split_into_units([file], target)]
    whole = file.path.read_bytes()
    assert b"".join(whole[span.start : span.stop] for span in spans) == whole
    assert all(whole[: span.stop].endswith(b"\n") for span in spans)
    assert all(target <= span.disk_bytes < 2 * target + 215 for span in spans[:-1])


@quick
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=30), target=st.integers(1, 2000))
def test_small_files_share_units_in_order(tmp_path: Path, sizes: list[int], target: int) -> None:
    files = [write(tmp_path / f"{place}.jsonl.gz", ["x"] * size) for place, size in enumerate(sizes)]
    units = split_into_units(files, target)
    assert [span.file for unit in units for span in unit.spans] == files
    assert all(len(unit.spans) == 1 or unit.disk_bytes <= target for unit in units)
    assert all(a.disk_bytes + b.spans[0].disk_bytes > target for a, b in zip(units, units[1:]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_broken_row_is_named_by_its_place_in_the_whole_file(tmp_path: Path, name: str) -> None:
    values = [f"text {number}" for number in range(100)]
    file = write(tmp_path / name, values)
    if name == "a.jsonl":
        file.path.write_bytes(file.path.read_bytes().replace(b'"text 77"', b"77").replace(b'"text 93"', b"93"))
    else:
        file = write(tmp_path / name, [None if number in (77, 93) else text for number, text in enumerate(values)])
    units = split_into_units([file], 200)
    assert len(units) > 5
    documents, broken = read_all(units)
    assert len(documents) == 98
    assert [message.split(": ")[0] for message in broken] == [f"{file.path}:78", f"{file.path}:94"]


def test_other_keys_and_labels(tmp_path: Path) -> None:
    options = ReadOptions(text_key="body", source_key="site")
    rows = [{"body": "a", "site": "s1", "text": 3}, {"body": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        for override, labels in ((False, ["s1", "file"]), (True, ["file", "file"])):
            units = split_into_units([InputFile(tmp_path / name, "file", override)], 1000, options)
            documents, broken = read_all(units, options)
            assert [(document.text, document.source) for document in documents] == list(zip("ab", labels))
            assert broken == []
    with pytest.raises(ValueError, match="--text-key"):
        ReadOptions("x", "x")


def test_a_file_that_changes_or_goes_ends_the_reading(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ["x" * 1000] * 500)
    unit = Unit(tuple(span for part in split_into_units([file], 1 << 18) for span in part.spans))
    reader = read_unit(unit, lambda *bad: None)
    next(reader)
    with open(file.path, "a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(InputChanged, match=r"a\.jsonl was changed while it was read"):
        list(reader)
    with pytest.raises(InputChanged, match="was changed"):
        next(read_unit(unit, lambda *bad: None))
    os.unlink(file.path)
    with pytest.raises(InputChanged, match="is gone"):
        next(read_unit(unit, lambda *bad: None))
