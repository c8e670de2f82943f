"""The cost model's predictions beside what was measured, recomputed from the committed results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import cost_cases  # noqa: E402

from megatron_spice.config.hf import ModelArchitecture  # noqa: E402
from megatron_spice.cost.device import default_file, read_device  # noqa: E402

TOLERANCE = 0.15
SMOLLM2 = ModelArchitecture.from_config({
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
})  # fmt: skip
CASES = cost_cases.committed_cases(ROOT / "docs" / "results", SMOLLM2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.part}: {case.name}")
def test_a_measured_case_is_predicted(case):
    assert abs(case.off(read_device(default_file("cpu")))) < TOLERANCE


def test_cases_that_gave_no_constant_are_of_every_phase():
    held_out = {case.part for case in CASES if not case.calibrates}
    assert {"play", "train", "sync", "wake"} <= held_out


def test_the_committed_constants_are_those_of_the_committed_results():
    before = read_device(default_file("cpu"))
    made = cost_cases.calibration(before.name, CASES, before, "")["constants"]
    for name, about in made.items():
        if about["measured"]:
            assert about["value"] == pytest.approx(before.constants[name].value, rel=0.2), name


def test_the_prediction_depends_on_the_device():
    """Halving a rate that matters moves a prediction out of the tolerance, so the test above can fail."""
    found = json.loads(default_file("cpu").read_text())
    found["constants"]["engine_step"]["value"] *= 3
    slower = cost_cases.Device("slower", True, {name: cost_cases_constant(about) for name, about in found["constants"].items()})
    plays = [case for case in CASES if case.part == "play"]
    assert all(case.off(slower) > TOLERANCE for case in plays)


def cost_cases_constant(about: dict):
    from megatron_spice.cost.device import Constant

    return Constant(**about)
