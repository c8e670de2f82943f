"""Nothing is drawn at random in an update, so a run that goes on needs no generator's state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ranks import run_ranks
from small_models import make_model, some_trajectories
from torch import nn

from megatron_spice.policy.chance import assert_draws_nothing

HERE = __file__


def generators_around_an_update(model: Any, trajectories: list[Any]) -> tuple[list[bool], str]:
    """On a rank: whether each generator is after an update as it was before; and what is said of a model with dropout."""
    import dataclasses
    import pickle
    import random

    import numpy
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_spice.cluster import distributed, platform, topology
    from megatron_spice.config.hf import read_architecture
    from megatron_spice.config.schema import Config
    from megatron_spice.policy import model as model_module
    from megatron_spice.policy.policy import Policy

    def states() -> list[bytes]:
        tracked = {name: state.numpy().tobytes() for name, state in get_cuda_rng_tracker().get_states().items()}
        return [torch.get_rng_state().numpy().tobytes(), pickle.dumps(random.getstate()), pickle.dumps(numpy.random.get_state()), pickle.dumps(tracked)]

    here = topology.from_environment(platform.prepare("cpu"))
    with distributed.process_group(here, 60):
        rooms = {
            "run": {"dir": "/nowhere"}, "corpus": {"path": "/nowhere"}, "policy": {"model": model, "precision": "fp8"},
            "game": {"challenger_max_tokens": 16, "reasoner_max_tokens": 16},
        }  # fmt: skip
        policy = Policy(Config.model_validate(rooms), read_architecture(model), here)
        policy.load_hf(model)
        before = states()
        assert policy.update(trajectories)["policy/grad_norm"] > 0
        same = [one == other for one, other in zip(before, states(), strict=True)]
        make = model_module.transformer_config
        model_module.transformer_config = lambda *arguments: dataclasses.replace(make(*arguments), hidden_dropout=0.1)
        try:
            model_module.build_chunks(policy.architecture, policy.policy_config, policy.layout, policy.placement, 1.0, policy.backend)
        except AssertionError as error:
            return same, str(error)
        return same, "built"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_an_update_draws_nothing(tmp_path, family) -> None:
    model = make_model(tmp_path / "hf", family, tied=False)
    [(same, told)] = run_ranks(1, HERE, "generators_around_an_update", model, some_trajectories())
    assert same == [True] * 4
    assert "hidden_dropout=0.1" in told and "draws at random" in told


def layer(**settings: float) -> nn.Module:
    made = nn.Linear(1, 1)
    made.config = SimpleNamespace(hidden_dropout=0.0, attention_dropout=0.0, moe_input_jitter_eps=None)
    for name, value in settings.items():
        setattr(made.config if name.startswith("moe") else made, name, value)
    return made


@pytest.mark.parametrize("drawing", [nn.Dropout(0.1), nn.Dropout3d(0.1), layer(hidden_dropout=0.1), layer(moe_input_jitter_eps=1e-3)])
def test_a_model_that_draws_is_not_built(drawing: nn.Module) -> None:
    assert_draws_nothing([nn.Sequential(nn.Dropout(0.0), layer())])
    with pytest.raises(AssertionError, match="1.1 draws at random .*checkpoints hold no generator's state"):
        assert_draws_nothing([nn.Sequential(layer(), nn.Sequential(layer(), drawing))])
