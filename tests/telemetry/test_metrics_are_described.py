"""docs/metrics.md against what runs have written and what the code can write: no number without a line there, and no line too many."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_spice.game.episodes import metrics as game_metrics
from megatron_spice.game.records import InvalidReason
from megatron_spice.policy.metrics import BOUNDS, ROLES
from megatron_spice.telemetry.ranks import SPREAD

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
RUNS = sorted((ROOT / "docs" / "results").rglob("*metrics.jsonl"))


def described() -> Iterator[str]:
    """The names in the first column of the tables of metrics.jsonl."""
    part = PAGE.partition("\n## metrics.jsonl")[2].partition("\n## episodes.jsonl")[0]
    for line in part.splitlines():
        if line.startswith("| `"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])


NAMES = list(described())


def missing(found: set[str]) -> set[str]:
    """Those of them that no name on the page stands for."""
    patterns = [re.compile(re.sub(r"<\w+>", ".+", name)) for name in NAMES]
    return {name for name in found if not any(pattern.fullmatch(name) for pattern in patterns)}


@pytest.mark.parametrize("run", RUNS, ids=lambda path: str(path.relative_to(ROOT / "docs" / "results")))
def test_what_runs_have_written_is_described(run: Path) -> None:
    found = {name for line in run.read_text(encoding="utf-8").splitlines() for name in json.loads(line)}
    assert not missing(found)


def test_what_the_code_lists_is_described() -> None:
    ranks = {f"ranks/{name.removeprefix('seconds/')}_{end}" for name in SPREAD for end in ("mean", "min", "max_rank")}
    update = {*(f"policy/{name}" for name in BOUNDS), *(f"drift/{role}" for role in ROLES)}
    assert not missing({*SPREAD, *ranks, *update, *game_metrics([])})
    reasons = PAGE.partition("### Why an attempt is invalid")[2].partition("\n## ")[0]
    assert not [reason.value for reason in InvalidReason if f"`{reason.value}`" not in reasons]


def test_names_stand_once_and_their_last_words_in_the_code() -> None:
    assert NAMES and len(NAMES) == len(set(NAMES))
    code = {word for path in (ROOT / "megatron_spice").rglob("*.py") for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    last = {name.partition("<")[0].rstrip("/_").rpartition("/")[2].removesuffix("_p99") for name in NAMES}
    assert not last - code
