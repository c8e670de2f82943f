"""Where a task's items come from: a file or folder of the user's, the factbook's held-out documents, or reasoning-gym."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_spice.evaluation import factbook
from megatron_spice.evaluation.items import Item, make_items
from megatron_spice.evaluation.puzzles import SIZE, puzzles
from megatron_spice.evaluation.rows import READERS, Wanted, read_rows
from megatron_spice.evaluation.tasks import OFFLINE, PUZZLES, Benchmark, Request

FACTBOOK = Path("assets/factbook.jsonl")


def request_for(benchmark: Benchmark, data: Sequence[str], maps: Sequence[str]) -> Request:
    """What was asked for a benchmark, out of all `--data` and `--map`.

    Raises:
        ValueError: an option is not of its form, or there is no file for the benchmark.
    """
    named = dict(option.split("=", 1) for option in data if "=" in option)
    folders = [Path(option) for option in data if "=" not in option]
    path = named.get(benchmark.name) or next((str(p) for folder in folders if (p := _inside(folder, benchmark.name))), "")
    fields: dict[str, str] = {}
    for option in maps:
        left, equals, name = option.partition("=")
        task, _, meaning = left.rpartition(".")
        if not equals or not meaning or not name:
            raise ValueError(f"--map {option}: expected MEANING=FIELD or TASK.MEANING=FIELD, such as question=problem")
        if task in ("", benchmark.name):
            fields[meaning] = name
    if not path and not benchmark.name.startswith(PUZZLES):
        if benchmark in OFFLINE:
            path = str(FACTBOOK)
        else:
            raise ValueError(
                f"{benchmark.name} ({benchmark.about}) needs its file: --data {benchmark.name}=PATH, or --data FOLDER with "
                f"{benchmark.name} and one of {', '.join(READERS)} in it"
            )
    return Request(benchmark, path, fields)


def _inside(folder: Path, name: str) -> Path | None:
    """A benchmark's file or folder in a folder of them."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: no such folder (files are given as --data TASK=FILE)")
    found = [folder / name, *(folder / f"{name}{ending}{packed}" for ending in READERS for packed in ("", ".gz", ".zst"))]
    return next((path for path in found if path.exists()), None)


def load(request: Request, split: str, limit: int | None) -> list[Item]:
    """The items of a request, the first `limit` of them.

    Raises:
        ValueError, FileNotFoundError: with the file, the field or the row that is wrong.
    """
    name = request.benchmark.name
    if name.startswith(PUZZLES):
        return puzzles(name, limit or SIZE)
    if request.benchmark in OFFLINE:
        return factbook.questions(Path(request.path), open_book=name.endswith("-open"), limit=limit)
    rows = read_rows(Path(request.path), split, Wanted(request.benchmark.files, request.benchmark.parts))
    return make_items(request.benchmark, rows, request.fields, request.path)[:limit]
