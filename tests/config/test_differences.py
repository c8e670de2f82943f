"""What two recipes differ in, said by key."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spice.config.differences import differences
from megatron_spice.config.keys import all_keys
from megatron_spice.config.schema import Config

RECIPE = {"run": {"dir": "/a"}, "corpus": {"path": "/b", "weights": {"x": 0.5, "y": 0.5}}, "policy": {"model": "/c"}}
KEYS = list(all_keys())
WHOLE = Config.model_validate(RECIPE).model_dump(mode="json")


@settings(max_examples=30)
@given(st.sets(st.sampled_from(sorted(KEYS)), max_size=6))
def test_exactly_the_changed_keys_are_named(names: set[str]) -> None:
    changed = copy.deepcopy(WHOLE)
    for name in names:
        *sections, last = name.split(".")
        place: Any = changed
        for section in sections:
            place = place[section]
        place[last] = {"changed": True}
    found = differences(WHOLE, changed)
    assert [line.partition(":")[0] for line in found] == [name for name in KEYS if name in names]
    assert all(line.endswith('is {"changed": true}') for line in found)
    assert differences(changed, changed) == []


def test_values_are_shown_and_those_of_another_version_too() -> None:
    older = copy.deepcopy(WHOLE)
    older["policy"]["learning_rate"] = 0.25
    older["corpus"]["weights"] = {}
    older["of_old"] = {"key": 1}
    del older["telemetry"]["episodes"]
    rate = WHOLE["policy"]["learning_rate"]
    assert set(differences(older, WHOLE)) == {
        f"policy.learning_rate: was 0.25, is {rate}", 'corpus.weights: was {}, is {"x": 0.5, "y": 0.5}',
        "telemetry.episodes: was no setting, is true", "of_old.key: was 1, is no setting",
    }  # fmt: skip
