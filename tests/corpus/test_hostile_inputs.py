"""Files made to break a reader: each is refused at once with its name, or read around in bounded memory."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_spice.corpus.documents import ReadOptions
from megatron_spice.corpus.inputs import InputFile, find_inputs
from megatron_spice.corpus.units import read_unit, split_into_units

GOOD = b'{"text": "good"}\n'
SMALL = ReadOptions(longest=1000)


def read(path: Path, options: ReadOptions = ReadOptions(), target: int = 1 << 20) -> tuple[list[str], list[str]]:
    """(texts, complaints as LINE: REASON) of a file."""
    texts, complaints = [], []
    for unit in split_into_units([InputFile(path, "label")], target, options):
        reader = read_unit(unit, lambda path, line, reason: complaints.append(f"{line}: {reason}"), options)
        texts += [document.text for document in reader]
    return texts, complaints


def read_in_little_memory(path: Path, megabytes: int = 400) -> tuple[int, list[str], float]:
    """(documents, complaints, seconds) of a file, by a process that may not have more memory than that."""
    program = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from megatron_spice.corpus.inputs import InputFile
from megatron_spice.corpus.units import read_unit, split_into_units
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[3]) << 20,) * 2)
complaints, count, began = [], 0, time.perf_counter()
for unit in split_into_units([InputFile(Path(sys.argv[2]), "x")], 64 << 20):
    for document in read_unit(unit, lambda path, line, reason: complaints.append(f"{line}: {reason}")):
        count += 1
print(json.dumps([count, complaints, time.perf_counter() - began]))
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program, str(root), str(path), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"\x00\x00\x00", "not JSON"),
        (b'{"text": "a\x00b"}', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 10)"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "\\udc00 x"}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[1]", "a JSON list"),
        (b"null", "a JSON NoneType"),
        (b'{"text": null}', "no string under `text`"),
        (b'{"txt": "a"}', "no string under `text` (keys: txt)"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
        (b'{"text": "a", "source": 3}', "`source` is a int"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8 (byte 0); it looks like UTF-16"),
        (b'{"text": "' + b"x" * 2000 + b'"}', "longer than 0 MiB"),
    ],
)
def test_a_broken_line_is_named_and_read_around(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\r\n" + line.replace(b"\n", b"") + b"\n" + GOOD.rstrip(b"\n"))
    options = SMALL if b"xxx" in line else ReadOptions()
    texts, complaints = read(path, options)
    assert texts == ["good", "good"]
    assert len(complaints) == 1 and complaints[0].startswith(f"3: {complaint}")


@pytest.mark.parametrize(
    "line",
    [
        b'\xef\xbb\xbf{"text": "good"}',
        b'{"text": "good"}\r',
        b'  {"text": "good", "score": NaN}',
        b'{"text": "good", "id": %s}' % (b"9" * 5000),
        b'{"text": "bad", "text": "good"}',
        b'{"text": "good", "x": [%s[]]}' % (b"[]," * 10000),
        b'{"te\\u0078t": "\\u0067ood"}',
    ],
)
def test_unusual_lines_are_read(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    assert read(tmp_path / "a.jsonl") == (["good"], [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(st.one_of(st.binary(max_size=60), st.just(GOOD[:-1]))))
def test_any_bytes_give_the_good_lines_and_one_complaint_for_each_other(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    texts, complaints = read(tmp_path / "a.jsonl")
    lines = [line for part in lines for line in part.split(b"\n")]
    others = [line for line in lines if line != GOOD[:-1] and line.strip(b" \t\r")]
    assert len(texts) == lines.count(GOOD[:-1])
    assert len(complaints) == len(others)


def test_a_line_of_a_gigabyte_is_skipped_fast_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as stream:
        stream.write(GOOD)
        stream.truncate(1 << 30)  # zeros that take no disk
        stream.seek(0, os.SEEK_END)
        stream.write(b"\n" + GOOD)
    count, complaints, seconds = read_in_little_memory(path)
    assert (count, complaints) == (2, ["2: longer than 32 MiB"])
    assert seconds < 20


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".txt.zst"])
def test_a_compressed_bomb_takes_time_not_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb{suffix}"
    megabytes = 512 if suffix.endswith("zst") else 128
    with zstd.open(path, "wb") if suffix.endswith("zst") else gzip.open(path, "wb", 1) as stream:
        for _ in range(megabytes // 4):
            stream.write(b" " * (4 << 20))
    assert path.stat().st_size < 1 << 20
    count, complaints, _ = read_in_little_memory(path)
    if suffix.startswith(".jsonl"):
        assert (count, complaints) == (0, ["1: longer than 32 MiB"])
    else:
        assert (count, complaints) == (512 // 32, [])


def test_compressed_files_of_several_frames_are_read_to_the_end(tmp_path: Path) -> None:
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstd.compress)):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compress(GOOD * 2) + compress(b"") + compress(GOOD[:5]) + compress(GOOD[5:]))
        assert read(path) == (["good"] * 3, [])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst"])
def test_a_damaged_compressed_file_gives_what_is_whole(tmp_path: Path, suffix: str) -> None:
    compress = gzip.compress if suffix.endswith("gz") else zstd.compress
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(5000))
    whole = compress(lines)
    for data in (whole[: len(whole) // 2], whole[:-2], b"no such thing" * 3):
        (tmp_path / f"a{suffix}").write_bytes(data)
        texts, complaints = read(tmp_path / f"a{suffix}")
        assert len(complaints) == 1 and "the compressed file is damaged from here on" in complaints[0]
        if suffix.startswith(".jsonl") and data is not whole[:-2]:
            assert complaints[0].startswith(f"{len(texts) + 1}: ")


def test_a_window_beyond_memory_is_told_from_damage(tmp_path: Path) -> None:
    parameter = zstd.CompressionParameter
    compressor = zstd.ZstdCompressor(options={parameter.window_log: 30, parameter.content_size_flag: 0})
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(GOOD) + compressor.flush())
    texts, complaints = read(tmp_path / "a.jsonl.zst")
    assert texts == [] and len(complaints) == 1 and "a window of over 128 MiB (zstd --long)" in complaints[0]


def test_plain_text(tmp_path: Path) -> None:
    cases = {
        b"": [],
        b"\xef\xbb\xbfwith a mark": ["with a mark"],
        b"line\r\nline": ["line\r\nline"],
        b"nul \x00": ["nul \x00"],
        b"a\n" * 900: ["a\n" * 500, "a\n" * 400],
    }
    for data, texts in cases.items():
        (tmp_path / "a.txt").write_bytes(data)
        assert read(tmp_path / "a.txt", SMALL) == (texts, [])
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff")
    assert read(tmp_path / "a.txt") == ([], ["2: not UTF-8 (byte 8 of the text)"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.sampled_from("a \n\u00e9\ufeff\U0001f600"), max_size=300), longest=st.integers(8, 50))
def test_a_text_cut_into_documents_loses_nothing(tmp_path: Path, text: str, longest: int) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    texts, complaints = read(tmp_path / "a.txt", ReadOptions(longest=longest))
    assert complaints == []
    assert "".join(texts) == text.removeprefix("\ufeff")
    assert all(len(part.encode()) <= longest for part in texts)


KINDS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string()),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", "-file.arrow"])
def test_columns_of_every_kind_of_text_with_holes(tmp_path: Path, kind: pa.DataType, suffix: str) -> None:
    values = [b"one", None, b"\xff", "\u00e9".encode(), b"x" * 1001, b"one"]
    if pa.types.is_dictionary(kind):
        dictionary = pa.array(values[0:1] + values[2:5], pa.binary()).view(pa.string())
        column = pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 2, 3, 0], pa.int32()), dictionary)
    else:
        wide = {pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}.get(kind, pa.binary())
        column = pa.array(values, wide if not pa.types.is_large_binary(kind) else kind).view(kind)
    path = tmp_path / f"a{suffix}"
    write_table(pa.table({"text": column}), path)
    texts, complaints = read(path, SMALL)
    assert texts == ["one", "\u00e9", "one"]
    assert complaints == ["2: `text` is null", "3: not UTF-8 (byte 0)", "5: longer than 0 MiB"]


def write_table(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=40)
    else:
        new = pa.ipc.new_file if path.name.endswith("-file.arrow") else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=40)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", "-file.arrow"])
def test_tables_that_cannot_be_used_are_refused_before_work(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_table(pa.table({"body": ["x"], "title": ["y"]}), path)
    with pytest.raises(ValueError, match="has no column `text`; it has `body`, `title`: name one by --text-key"):
        read(path)
    write_table(pa.table({"text": [1]}), path)
    with pytest.raises(ValueError, match="column `text` is int64, not text"):
        read(path)
    write_table(pa.table({"text": ["x"], "source": [{"a": 1}]}), path)
    with pytest.raises(ValueError, match="column `source` is struct.* --source-key"):
        read(path)
    write_table(pa.table({"text": [os.urandom(100).hex() for _ in range(100)]}), path)
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[: len(whole) // 2], b"\x00" * 5000):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"cannot be read as (Parquet|Arrow); leave it out or fetch it again"):
            read(path)


def test_a_flipped_byte_in_a_parquet_page_costs_its_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{number:03d} " + os.urandom(50).hex() for number in range(120)]})
    pq.write_table(table, path, row_group_size=40, use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data[second.data_page_offset + second.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    texts, complaints = read(path)
    assert [int(text[:3]) for text in texts] == [*range(40), *range(80, 120)]
    assert len(complaints) == 1 and complaints[0].startswith("41: row group 1 is damaged from here on")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1), bit=st.integers(0, 7), suffix=st.sampled_from([".parquet", ".arrow", "-file.arrow"]))
def test_a_flipped_bit_anywhere_never_ends_in_a_crash(tmp_path: Path, place: float, bit: int, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_table(pa.table({"text": [f"text {number}" for number in range(100)]}), path)
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)
    try:
        texts, complaints = read(path)
    except ValueError as error:
        assert "a.parquet" in str(error) or "arrow" in str(error)
    else:
        assert len(texts) <= 100 or complaints


def test_folders_with_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".git").mkdir(parents=True)
    (tmp_path / "deep" / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "deep" / ".git" / "b.jsonl").write_bytes(GOOD)
    (tmp_path / "deep" / ".hidden.jsonl").write_bytes(GOOD)
    (tmp_path / "deep" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "deep" / "again.jsonl").symlink_to(tmp_path / "deep" / "a.jsonl")
    (tmp_path / "deep" / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "deep" / "pipe.jsonl")
    assert [file.path.name for file in find_inputs([str(tmp_path)])] == ["a.jsonl"]
    (tmp_path / "deep" / "self.jsonl").symlink_to("self.jsonl")
    for argument in (tmp_path, tmp_path / "deep" / "self.jsonl"):
        with pytest.raises(ValueError, match=r"self\.jsonl is a link that leads nowhere"):
            find_inputs([str(argument)])
    with pytest.raises(ValueError, match=r"pipe\.jsonl is a pipe or a device"):
        find_inputs([str(tmp_path / "deep" / "pipe.jsonl")])
    with pytest.raises(ValueError, match="/dev/zero is a pipe or a device"):
        find_inputs(["/dev/zero"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds none of"):
        find_inputs([str(tmp_path / "empty")])


def test_patterns_do_not_go_round_in_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / ".git").mkdir(parents=True)
    for name in ("a.jsonl", "b.txt", "deep/c.jsonl", "deep/.git/d.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    for folder in (tmp_path, tmp_path / "deep"):
        for number in range(3):  # `glob` would look into 4 ** 40 folders
            (folder / f"loop{number}").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    cases = {
        "**/*.jsonl": ["a.jsonl", "deep/c.jsonl"],
        "**/*": ["a.jsonl", "b.txt", "deep/c.jsonl"],
        "**": ["a.jsonl", "b.txt", "deep/c.jsonl"],
        "*/*.jsonl": ["deep/c.jsonl"],
        "deep/.git/*": ["deep/.git/d.jsonl"],
        "[ab].*": ["a.jsonl", "b.txt"],
        f"{tmp_path}/d?ep/*": [f"{tmp_path}/deep/c.jsonl"],
    }
    for pattern, expected in cases.items():
        found = [os.path.realpath(file.path) for file in find_inputs([pattern])]
        assert set(found) == {os.path.realpath(name) for name in expected} | (
            {str(tmp_path / "a.jsonl")} if pattern == "*/*.jsonl" else set()  # through a link of one step
        )
    for pattern in ("nothing*", "nowhere/*.jsonl", "a[.jsonl"):
        with pytest.raises(ValueError, match="no such file, folder or match"):
            find_inputs([pattern])


def test_files_and_folders_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open.jsonl").write_bytes(GOOD)
    (tmp_path / "closed.jsonl").write_bytes(GOOD)
    (tmp_path / "closed.jsonl").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    if os.geteuid() == 0:  # whom nothing is closed to: what the kernel would answer another user
        listdir = os.scandir

        def scandir(path):
            if str(path).endswith("/closed"):
                raise PermissionError(13, "Permission denied", str(path))
            return listdir(path)

        monkeypatch.setattr(os, "scandir", scandir)
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed.jsonl"))
    with pytest.raises(ValueError, match=r"no permission to read .*closed\.jsonl"):
        find_inputs([str(tmp_path / "*.jsonl")])
    with pytest.raises(ValueError, match="folder .*closed cannot be read: Permission denied"):
        find_inputs([str(tmp_path)])


def test_hugging_face_folders(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    for split in ("train", "test"):
        (saved / split).mkdir(parents=True)
        for name in ("data-00000-of-00001.arrow", "cache-123.arrow"):
            write_table(pa.table({"text": [split]}), saved / split / name)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (saved / split / "state.json").write_text(json.dumps(state))
        (saved / split / "dataset_info.json").write_text("{}")
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for folder, splits in ((saved, ["train", "test"]), (saved / "test", ["test"])):
        files = find_inputs([str(folder)])
        assert [(file.path.parent.name, file.source) for file in files] == [(name, folder.name) for name in splits]
        assert [read(file.path)[0] for file in files] == [[name] for name in splits]
    (saved / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match="lists data-00000-of-00001.arrow, which is not there"):
        find_inputs([str(saved)])
    (saved / "dataset_dict.json").write_text('{"splits": ["../../etc"]}')
    with pytest.raises(ValueError, match=r"dataset_dict\.json cannot be read"):
        find_inputs([str(saved)])

    snapshot = tmp_path / "snapshot"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\nThe card.\n")
    (snapshot / "dataset_infos.json").write_text("{}")
    (tmp_path / "blob").write_bytes(b"")
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "blob")
    (snapshot / "data" / "train-00000-of-00002.parquet").symlink_to(tmp_path / "blob")
    assert [(file.path.name, file.source) for file in find_inputs([str(snapshot)])] == [
        ("train-00000-of-00002.parquet", "train")
    ]
    assert read(find_inputs([str(snapshot)])[0].path) == (["row"], [])


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"text {number}" for number in range(2500)], "meta": [{"a": 1}] * 2500, "tags": [["x"]] * 2500}
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict(rows)})
    both.save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    both["train"].to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    for folder, label, times in (("saved", "saved", 2), ("saved/test", "test", 1), ("hub", "train", 1)):
        files = find_inputs([str(tmp_path / folder)])
        assert {file.source for file in files} == {label}
        units = split_into_units(files, 30_000)
        assert len(units) > 2 or folder == "hub"
        texts = [document.text for unit in units for document in read_unit(unit, lambda *bad: None)]
        assert texts == rows["text"] * times
