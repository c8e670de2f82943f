from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_spice.config.schema import Config
from megatron_spice.telemetry.json_lines import JsonLines, read_json_lines
from megatron_spice.telemetry.progress import progress_line
from megatron_spice.telemetry.run_log import RunLog


def config(run_dir: Path, **telemetry: object) -> Config:
    return Config(run={"dir": run_dir}, corpus={"path": "corpus"}, policy={"model": "model"}, telemetry=telemetry)


def iterations(path: Path) -> list[int]:
    return [record["iteration"] for record in read_json_lines(path)]


METRICS = {
    "reasoner/pass_rate": 0.312,
    "challenger/valid_share": 0.56,
    "challenger/reward": 0.21,
    "reasoner/reward": 0.305,
    "tokens_per_second": 412.4,
    "seconds/play": 14.2,
    "seconds/train": 10.11,
    "seconds/sync": 0.4,
    "seconds/save": 0.001,
    "seconds/iteration": 26.14,
}


def test_the_progress_line() -> None:
    assert progress_line(3, 50, METRICS) == (
        "iteration 3/50 | pass 0.31 | valid 0.56 | reward C 0.21 R 0.30 | 412 tok/s | "
        "play 14.2s train 10.1s sync 0.4s | 26.1s"
    )


def test_what_is_unknown_is_left_out_of_the_line() -> None:
    assert progress_line(1, 2, {}) == "iteration 1/2"
    known = {"reasoner/pass_rate": math.nan, "challenger/reward": -0.1}
    assert progress_line(1, 2, known) == "iteration 1/2 | reward C -0.10"


def test_a_run_is_written_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", config(tmp_path)) as log:
        for number in (1, 2):
            log.episodes([{"iteration": number, "slot": slot, "text": "\u00e9\n"} for slot in (0, 1)])
            log.iteration(number, 2, {**METRICS, "policy/loss": math.inf})
            # A crash from here on loses nothing that was said.
            assert iterations(tmp_path / "run" / "metrics.jsonl")[-1] == number
            assert iterations(tmp_path / "run" / "episodes.jsonl")[-1] == number
    assert [line.split(" |")[0] for line in capsys.readouterr().out.splitlines()] == ["iteration 1/2", "iteration 2/2"]
    record = read_json_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert record["challenger/reward"] == 0.21
    assert record["policy/loss"] is None
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("challenger/reward")] == [1, 2]


def test_a_resumed_run_has_no_iteration_twice(tmp_path: Path) -> None:
    settings_ = config(tmp_path)
    with RunLog(tmp_path, settings_) as log:
        for number in (1, 2, 3):
            log.episodes([{"iteration": number, "slot": slot} for slot in (0, 1)])
            log.iteration(number, 4, METRICS)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "rew')  # killed while writing
    with RunLog(tmp_path, settings_, resumed_from=2) as log:
        for number in (3, 4):
            log.episodes([{"iteration": number, "slot": slot} for slot in (0, 1)])
            log.iteration(number, 4, METRICS)
    assert iterations(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert iterations(tmp_path / "episodes.jsonl") == [1, 1, 2, 2, 3, 3, 4, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("challenger/reward")] == [1, 2, 3, 4]


def test_episodes_and_tensorboard_can_be_switched_off(tmp_path: Path) -> None:
    with RunLog(tmp_path, config(tmp_path, episodes=False, tensorboard=False)) as log:
        log.episodes([{"iteration": 1}])
        log.iteration(1, 1, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_wandb_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"telemetry\.wandb_project=spice .*pip install .*wandb"):
        RunLog(tmp_path, config(tmp_path, wandb_project="spice"))


@given(counts=st.lists(st.integers(1, 3), max_size=6), keep=st.integers(0, 7), torn=st.integers(0, 25))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resuming_keeps_exactly_what_came_before(tmp_path: Path, counts: list[int], keep: int, torn: int) -> None:
    path = tmp_path / "lines.jsonl"
    path.unlink(missing_ok=True)
    records = [{"iteration": number, "n": n} for number, count in enumerate(counts, start=1) for n in range(count)]
    lines = JsonLines(path, 0)
    lines.write(records)
    lines.close()
    with open(path, "a") as file:
        file.write(json.dumps({"iteration": len(counts) + 1, "n": 0})[:torn])
    JsonLines(path, keep).close()
    assert read_json_lines(path) == [record for record in records if record["iteration"] <= keep]


def test_half_a_surrogate_pair_is_written_as_json_spells_it(tmp_path: Path) -> None:
    records = [{"iteration": 1, "text": text} for text in ("a\ud83d\"b", "\\\udfff", "\U0001f600")]
    lines = JsonLines(tmp_path / "lines.jsonl", 0)
    lines.write(records)
    lines.close()
    assert read_json_lines(tmp_path / "lines.jsonl") == records


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"iteration": 1}\n{"iter\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl:2: not JSON"):
        read_json_lines(tmp_path / "lines.jsonl")
