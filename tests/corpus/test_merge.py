"""Tasks that are merged give the corpus of one run; what does not belong together is refused, and nothing is left behind."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from made_corpus import Document, everything, make_corpus, write_part

from megatron_spice.corpus.combine import Piece
from megatron_spice.corpus.manifest import Manifest
from megatron_spice.corpus.merge import merge
from megatron_spice.corpus.verify import verify_corpus

PARTS = [[Document("ab"[number % 2], [number] * 6) for number in range(5 * part, 5 * part + 5)] for part in range(3)]
PARTS.insert(1, [])  # a task that got nothing


def write_tasks(folder: Path, inputs: list[dict] | None = None) -> list[Path]:
    tasks = []
    for number, part in enumerate(PARTS):
        piece = write_part(folder / f"{number:05d}", part)
        inputs = inputs or [{"path": "/texts.jsonl", "bytes": 7}]
        replace(piece.manifest, task=[number, len(PARTS)], inputs=inputs).write(piece.path)
        tasks.append(piece.path)
    return tasks


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_tasks_in_any_order_are_the_corpus_of_one_run(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "corpus.tasks")
    merged = merge(tmp_path / "corpus", tasks[::-1], ["how"])
    whole = make_corpus(tmp_path / "whole", [document for part in PARTS for document in part])
    assert everything(tmp_path / "corpus") == everything(whole)
    assert list(verify_corpus(tmp_path / "corpus")) == []
    assert merged == Manifest.read(tmp_path / "corpus")
    assert (merged.task, merged.inputs, merged.command) == (None, [{"path": "/texts.jsonl", "bytes": 7}], ["how"])
    assert merged.folders == [f"../corpus.tasks/{number:05d}" for number in range(4)]
    assert leftovers(tmp_path) == []


def test_the_folders_can_be_moved_together(tmp_path: Path) -> None:
    merge(tmp_path / "here" / "corpus", write_tasks(tmp_path / "here" / "tasks"))
    before = everything(tmp_path / "here" / "corpus")
    (tmp_path / "here").rename(tmp_path / "there")
    assert everything(tmp_path / "there" / "corpus") == before
    (tmp_path / "there" / "tasks").rename(tmp_path / "there" / "elsewhere")
    with pytest.raises(ValueError, match=r"\.\./tasks/00000/shard_00000\.bin is missing"):
        everything(tmp_path / "there" / "corpus")


def test_a_merge_that_is_done_is_not_done_again_and_nothing_is_overwritten(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    first = merge(tmp_path / "corpus", tasks, ["first"])
    written = (tmp_path / "corpus" / "manifest.json").stat().st_mtime_ns
    assert merge(tmp_path / "corpus", tasks, ["again"]) == first
    other = make_corpus(tmp_path / "other", PARTS[0])
    with pytest.raises(ValueError, match="corpus is another corpus"):
        merge(tmp_path / "corpus", [other])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full is not empty"):
        merge(tmp_path / "full", [other])
    assert (tmp_path / "corpus" / "manifest.json").stat().st_mtime_ns == written
    assert leftovers(tmp_path) == []


def test_records_of_broken_lines_are_joined(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    for number in (0, 2):
        (tasks[number] / "bad_lines.txt").write_text(f"file:{number}: why\n")
    merge(tmp_path / "corpus", tasks)
    assert (tmp_path / "corpus" / "bad_lines.txt").read_text() == "file:0: why\nfile:2: why\n"


def test_whole_corpora_of_different_inputs_are_joined_in_their_order(tmp_path: Path) -> None:
    corpora = [make_corpus(tmp_path / name, part) for name, part in zip("zyx", (PARTS[0], PARTS[2], PARTS[3]))]
    merge(tmp_path / "corpus", corpora)
    assert everything(tmp_path / "corpus") == everything(
        make_corpus(tmp_path / "whole", [document for part in PARTS for document in part])
    )
    with pytest.raises(ValueError, match="both hold z-part"):
        merge(tmp_path / "twice", [corpora[0], corpora[1], corpora[0]])


def changed(path: Path, **fields: object) -> None:
    replace(Manifest.read(path), **fields).write(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: tasks.pop(2), r"of 4 tasks 1 are missing: 2; run them with --task I/4"),
        (lambda tasks: tasks.append(shutil.copytree(tasks[0], tasks[0].parent / "copy")), "are the same task, 0 of 4"),
        (lambda tasks: changed(tasks[1], task=[1, 5]), "tasks of different requests"),
        (lambda tasks: changed(tasks[1], inputs=[{"path": "/other"}]), "tasks of different requests"),
        (lambda tasks: changed(tasks[1], task=None), "00001 is a whole corpus, .*00000 one task of several"),
        (lambda tasks: changed(tasks[1], dtype="int32"), "made with different dtype"),
        (lambda tasks: changed(tasks[1], tokenizer={"hash": "x"}), "made with different tokenizer"),
        (lambda tasks: changed(tasks[1], options={"max_tokens": 9}), "made with different options"),
        (lambda tasks: (tasks[3] / "shard_00001.bin").unlink(), r"00003: shard_00001\.bin is missing"),
        (lambda tasks: (tasks[3] / "passages.npy").write_bytes(b"x"), r"00003: passages\.npy has 1 bytes"),
        (lambda tasks: (tasks[3] / "manifest.json").unlink(), r"00003 has no manifest\.json"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, change, message: str) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    change(tasks)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge(tmp_path / "corpus", tasks)
    assert not (tmp_path / "corpus").exists() and leftovers(tmp_path) == []


def test_a_corpus_is_not_merged_into_itself(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", PARTS[0])
    for output in (corpus, corpus / "merged"):
        with pytest.raises(ValueError, match="give an output beside the corpora"):
            merge(output, [corpus])
    assert Piece.read(corpus).manifest.documents == 5


def test_nothing_in_it_is_no_corpus(tmp_path: Path) -> None:
    piece = write_part(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="no passage in 1 corpora"):
        merge(tmp_path / "corpus", [piece.path])
