"""The cost model's predictions beside what was measured, recomputed from the committed results."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import calibrate_benchmark  # noqa: E402
import cost_cases  # noqa: E402
import cost_fit  # noqa: E402
import scaling_benchmark  # noqa: E402

from megatron_spice.config.hf import ModelArchitecture  # noqa: E402
from megatron_spice.cost.device import default_file, read_device  # noqa: E402

TOLERANCE = 0.15
RESULTS = ROOT / "docs" / "results"
SMOLLM2 = ModelArchitecture.from_config({
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
})  # fmt: skip
CPU, GPU = read_device(default_file("cpu")), read_device(default_file("cuda"))
CASES, GPU_CASES = cost_cases.committed_cases(RESULTS, SMOLLM2), cost_cases.committed_gpu_cases(RESULTS)
CALIBRATED = json.loads((RESULTS / "cost-cpu" / "calibrate.json").read_text())["results"]
CALIBRATED_CASES = calibrate_benchmark.cases_of(CALIBRATED, SMOLLM2)
CALIBRATION = json.loads((RESULTS / "cost-cpu" / "calibration.json").read_text())


def named(cases: list[cost_fit.Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"{case.part}: {case.name}")


@named(CASES)
def test_a_measured_case_is_predicted(case):
    assert abs(case.off(CPU)) < TOLERANCE


@named(GPU_CASES)
def test_a_case_measured_on_a_gpu_is_predicted(case):
    assert abs(case.off(GPU)) < TOLERANCE


@named(CALIBRATED_CASES)
def test_a_case_of_a_machine_s_own_calibration_is_predicted(case):
    """`benchmark.py calibrate`: by the constants of the cases that calibrate, these and those that are held out."""
    assert abs(case.off(calibrate_benchmark.device_of(CALIBRATION))) < TOLERANCE


@pytest.mark.parametrize("file", ["scaling", "first", "tails"])
def test_an_iteration_of_virtual_nodes_is_predicted(file):
    """Up to 32 ranks: by its waits, and what ranks compute on two cores."""
    rows = scaling_benchmark.summary(json.loads((RESULTS / "scaling-cpu" / f"{file}.json").read_text())["results"])
    assert [row["ranks"] for row in rows if abs(row["predicted_seconds"] / row["seconds"] - 1.0) >= TOLERANCE] == []
    assert {row["ranks"] for row in rows} >= {1, 32}


@pytest.mark.parametrize("cases, parts", [
    (CASES, {"play", "train", "sync", "wake"}), (CALIBRATED_CASES, {"play", "train", "sync", "wake", "save"}), (GPU_CASES, {"train"}),
])  # fmt: skip
def test_cases_that_gave_no_constant_are_of_every_phase(cases, parts):
    assert {case.part for case in cases if not case.calibrates} >= parts


def test_the_committed_constants_are_those_of_the_committed_results():
    for made, committed in (
        (cost_fit.calibration(CPU.name, CASES, read_device(cost_fit.ASSUMED), ""), json.loads(default_file("cpu").read_text())),
        (calibrate_benchmark.calibrated(CALIBRATED, SMOLLM2), CALIBRATION),
    ):  # fmt: skip
        values = ({name: about["value"] for name, about in each["constants"].items()} for each in (made, committed))
        assert next(values) == pytest.approx(next(values), rel=1e-2)


def changed(**settings):
    """The committed results, measured otherwise."""
    return [result | {"job": result["job"] | settings} for result in CALIBRATED]


def test_a_gpu_is_not_as_slow_as_the_many_cores_beside_it_make_it_look():
    found = [calibrate_benchmark.cases_of(changed(device="cuda", threads=threads), SMOLLM2) for threads in (1, 16)]
    assert {case.threads for case in found[1] if "layers" in case.name} == {1}
    assert [case.work for case in found[0]] == [case.work for case in found[1]]


def test_one_core_and_other_precisions_are_counted():
    assert all(case.threads == 1 for case in calibrate_benchmark.cases_of(changed(threads=1), SMOLLM2))
    plays = [
        [case.work for case in calibrate_benchmark.cases_of(changed(precision=precision), SMOLLM2) if case.part == "play"]
        for precision in ("bf16", "fp32")
    ]
    for half, whole in zip(*plays, strict=True):
        assert (whole["engine_memory"], whole["engine_cache"]) == (2 * half["engine_memory"], 2 * half["engine_cache"])


def test_an_iteration_without_a_task_is_left_out():
    [runs] = [result for result in CALIBRATED if result["job"]["kind"] == "iteration"]
    first, *others = runs["rounds"][0]["ours"]
    without = first | {"metrics": {name: value for name, value in first["metrics"].items() if name != "reasoner/length"}}
    cases = cost_cases.run_cases(runs["job"], {"rounds": [{"ours": [without, *others]}, {"ours": [without]}]}, SMOLLM2)
    assert {case.part for case in cases} == {"play", "train", "sync", "wake"} and len(cases) == 4
    assert not any(f"iteration {first['iteration']} " in case.name for case in cases)


@given(st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3), st.integers(0, 99))
def test_the_constants_that_made_the_cases_are_found_again(factors, seed):
    """Even where they differ from what was assumed by ten times, up or down, as long as the cases tell them apart."""
    names, rng = ("engine_memory", "engine_step", "engine_sequence"), random.Random(seed)
    true = {name: CPU.constants[name].seconds * factor for name, factor in zip(names, factors)}
    cases = []
    for number in range(9):
        shares = [0.9 if number % 3 == place else 0.05 for place in range(3)]
        work = {name: share * rng.uniform(1.0, 20.0) / true[name] for name, share in zip(names, shares)}
        cases.append(cost_fit.Case("made", "play", work, 1, sum(work[name] * true[name] for name in names), True))
    assert cost_fit.fit(cases, CPU) == pytest.approx(true, rel=0.05)


def test_what_the_cases_leave_open_is_not_called_measured():
    """Two kinds of work that always go together, as much of each, beside one that is alone in a case."""
    works = [{"engine_step": 1.0, "engine_sequence": 10.0, "engine_request": 2.0}, {"engine_request": 9.0}]
    cases = [cost_fit.Case("made", "play", work, 1, CPU.seconds(work), True) for work in works]
    made = cost_fit.calibration("made", cases, CPU, "made")["constants"]
    found = {name: made[name]["measured"] for name in ("engine_step", "engine_sequence", "engine_request")}
    assert found == {"engine_step": False, "engine_sequence": False, "engine_request": True}


def test_the_prediction_depends_on_the_device():
    """Halving a rate that matters moves a prediction out of the tolerance, so the test above can fail."""
    found = json.loads(default_file("cpu").read_text())
    found["constants"]["engine_step"]["value"] *= 3
    slower = calibrate_benchmark.device_of(found)
    plays = [case for case in CASES if case.part == "play"]
    assert all(case.off(slower) > TOLERANCE for case in plays)
