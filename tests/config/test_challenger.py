"""Recipes in which another model than the policy writes the tasks: what contradicts itself is named before the start."""

from __future__ import annotations

import pytest

from megatron_spice.config.checks import check_challenger
from megatron_spice.config.loader import load_config

SERVED = {"challenger": {"engines": ["http://gpu9:30000"]}}


@pytest.mark.parametrize("sections, words", [
    ({"rollout": SERVED}, ["rollout.challenger.engines", "game.fixed_challenger=true"]),
    ({"rollout": {"challenger": {"prompt_style": "chat"}}}, ["rollout.challenger.prompt_style", "leave rollout.challenger out"]),
    ({"game": {"fixed_challenger": True}, "cluster": {"ranks_per_node": 2, "device": "cuda"}}, ["on CUDA", "rollout.challenger.engines"]),
    ({"game": {"fixed_challenger": True}, "rollout": {"challenger": {"engines": ["gpu9"]}}}, ["gpu9 is not the address"]),
    ({"game": {"fixed_challenger": True}, "rollout": {"engines": ["http://GPU9:30000/"], **SERVED}}, ["both name http://gpu9:30000"]),
    ({"game": {"fixed_challenger": True}, "rollout": {"oversample": 1.5, **SERVED}}, ["rollout.oversample=1.5", "give rollout.oversample=1"]),
    ({"game": {"fixed_challenger": True}, "rollout": {"challenger": {**SERVED["challenger"], "tokenizer": "nowhere"}}},
     ["rollout.challenger.tokenizer=nowhere", "tokenizer.json"]),
])  # fmt: skip
def test_what_cannot_be_is_named(write_recipe, sections, words):
    [problem] = check_challenger(load_config(write_recipe(**sections)))
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize("sections", [
    {}, {"game": {"fixed_challenger": True}}, {"game": {"fixed_challenger": True}, "rollout": SERVED},
    {"game": {"fixed_challenger": True}, "rollout": SERVED, "cluster": {"ranks_per_node": 2, "device": "cuda"}},
])  # fmt: skip
def test_what_can_be_is_let_pass(write_recipe, sections):
    assert check_challenger(load_config(write_recipe(**sections))) == []
