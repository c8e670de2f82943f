"""The cost model's laws, its files, and what `plan` says by it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_shapes import add_corpus, add_model

from megatron_spice import plan
from megatron_spice.config.errors import ConfigError
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.loader import load_config
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.cost.device import default_file, read_device
from megatron_spice.cost.play import Batch, EngineShape, batch_work
from megatron_spice.cost.update import update_work
from megatron_spice.game.records import Trajectory
from megatron_spice.policy.packing import plan_rows

ROOT = Path(__file__).resolve().parents[2]
SMALL = ModelArchitecture.from_config({
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
})  # fmt: skip


def work_of(rows: int, **settings: int):
    config = PolicyConfig.model_validate({"model": "unused", "tokens_per_microbatch": 100, **settings})
    ranks = settings.get("tensor_parallel_size", 1) * settings.get("pipeline_parallel_size", 1)
    layout = ParallelLayout.of(config, SMALL, ranks)
    trajectories = [Trajectory("reasoner", (number,) * 60, (0,) * 40, (), 1.0, 0.0) for number in range(rows)]
    [planned] = plan_rows(trajectories, 100, 1)
    return update_work(SMALL, config, layout, planned, 8)


@given(st.integers(1, 12))
def test_the_pipeline_has_the_bubble_of_its_rows(rows):
    """Of p equal stages each computes a p-th, m rows and (p - 1) more for filling; only the last has the output matrix."""
    whole, staged = work_of(rows)["attention"], work_of(rows, pipeline_parallel_size=4)["attention"]
    assert staged == pytest.approx(whole / 4 * (1 + 3 / rows))


@given(st.sampled_from([2, 4]), st.integers(1, 6))
def test_tensor_parallelism_divides_arithmetic_and_adds_transfers(size, rows):
    whole, split = work_of(rows), work_of(rows, tensor_parallel_size=size)
    assert split["matmul"] == pytest.approx(whole["matmul"] / size) and whole["link"] == 0 and split["link"] > 0


@given(st.lists(st.floats(1, 200), min_size=1, max_size=40), st.integers(1, 40))
def test_decoding_takes_the_longest_and_waves_take_longer(lengths, most):
    free = batch_work(SMALL, EngineShape(), Batch(1, 50, lengths))
    bound = batch_work(SMALL, EngineShape(most_sequences=most), Batch(1, 50, lengths))
    assert free["engine_step"] == max(lengths) and bound["engine_step"] >= free["engine_step"]
    assert bound["engine_sequence"] == pytest.approx(sum(lengths))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_package_s_files_are_whole(kind):
    device = read_device(default_file(kind))
    assert all(constant.source for constant in device.constants.values())


@pytest.mark.parametrize("change, named", [
    (lambda found: found["constants"].pop("copy"), "copy"),
    (lambda found: found["constants"]["copy"].update(value=0), "copy=0"),
    (lambda found: found["constants"]["copy"].update(unit="s"), "copy is in s"),
    (lambda found: found.pop("constants"), "is no calibration"),
])  # fmt: skip
def test_a_wrong_file_is_refused_by_name(tmp_path, change, named):
    found = json.loads(default_file("cpu").read_text())
    change(found)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=re.escape(named)):
        read_device(path)


RECIPES = sorted(path for path in (ROOT / "examples").glob("*g-*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_plan_says_how_long_an_iteration_takes(path, tmp_path):
    model, nodes = re.match(r"(.+)-(\d+)n", path.stem).groups()
    overrides = [
        f"policy.model={add_model(tmp_path / 'model', model)}", f"corpus.path={add_corpus(tmp_path / 'corpus', model)}",
    ]  # fmt: skip
    text, _ = plan.describe(load_config(path, overrides), int(nodes))
    rows = [line.split() for line in text.split("# Expected time")[1].splitlines() if re.match(r"\s*\d+ +\d+ +\d+ ", line)]
    assert [int(rows[0][0]), int(rows[-1][1])] == [int(nodes), 1024]
    for row in rows:
        assert all(math.isfinite(float(cell)) for cell in row) and 0 < float(row[-1]) <= 1.0
    assert "constants measured:" in text and "constants assumed or published:" in text
