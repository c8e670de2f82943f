"""Groups of runs against the first: what seeds can tell, and what one seed cannot."""

from __future__ import annotations

import json
from pathlib import Path

from made_run import made_run

from megatron_spice.report.compare import compare
from megatron_spice.report.groups import group_runs
from megatron_spice.report.runs import read_run


def rows_of(tmp_path: Path, seeds: int) -> dict:
    folders = []
    for no_corpus in (False, True):
        for seed in range(seeds):
            recipe = {"train": {"seed": seed}, "game": {"no_corpus": no_corpus}}
            rate = 0.5 - 0.3 * no_corpus + 0.01 * seed
            folder = made_run(tmp_path / f"{'bare' if no_corpus else 'full'}-{seed}", 10, recipe, reasoner__pass_rate=lambda _, rate=rate: rate, policy__entropy=lambda _: 1.0)
            (folder / "evaluation").mkdir()
            (folder / "evaluation" / "iteration_10.json").write_text(json.dumps({"tasks": {"factbook": rate}}))
            folders.append(folder)
    return dict(compare(group_runs([read_run(folder) for folder in folders])))


def test_a_difference_beyond_the_seeds_is_clear(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 3)
    for row in ("pass rate", "evaluation: factbook"):
        first, second = rows[row]
        assert (first.value, first.difference, second.value, second.clear) == ("0.51", "", "0.21", True)
        assert second.difference.startswith("\u22120.3 (\u22120.323 to \u22120.277)")
    assert not rows["entropy"][1].clear


def test_one_seed_tells_no_interval(tmp_path: Path) -> None:
    first, second = rows_of(tmp_path, 1)["pass rate"]
    assert first.interval == second.interval == "" and not second.clear
    assert second.difference == "\u22120.3 (one seed: may be luck)"
