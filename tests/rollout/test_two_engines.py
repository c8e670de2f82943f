"""Two engines as one: who is asked what, who is updated, and that neither outlives the other."""

from __future__ import annotations

import asyncio

import pytest

from megatron_spice.game.records import Completion, Sampling
from megatron_spice.rollout.crew import Crew
from megatron_spice.rollout.engine import EngineError
from megatron_spice.rollout.two_engines import FIXED, TwoEngines

VERBS = ("launch", "wait_ready", "close", "kill", "check", "sleep", "wake", "begin_update", "update_bucket", "end_update")


class Recording:
    """An engine that notes what it is told and fails at one verb."""

    def __init__(self, name: str, fails_at: str = "") -> None:
        self.told: list[str] = []
        self._name = name
        for verb in VERBS:
            setattr(self, verb, lambda *_, verb=verb: self._note(verb, verb == fails_at))

    def _note(self, verb: str, fails: bool) -> None:
        self.told.append(verb)
        if fails:
            raise EngineError(f"{self._name} cannot {verb}")

    async def generate(self, prompt_ids, num_samples, sampling):
        self.told.append("generate")
        return [Completion(tuple(prompt_ids), (1,), (-1.0,), "stop", self._name, "7")] * num_samples

    async def abort(self):
        self.told.append("abort")

    async def close_requests(self):
        self.told.append("close_requests")

    def score(self, token_ids):
        return [0.5]

    def weight_version(self):
        return self._name


def test_each_role_is_asked_of_its_own_engine_and_only_the_policys_is_updated():
    policy, beside = Recording("policy"), Recording("beside")
    both = TwoEngines(policy, beside)
    asked = [asyncio.run(both.generate([1], 2, Sampling(1.0, 4, role=role))) for role in ("challenger", "reasoner")]
    assert [(said[0].text, said[0].weight_version, len(said)) for said in asked] == [("beside", FIXED, 2), ("policy", "7", 2)]
    both.begin_update()
    both.update_bucket([])
    both.end_update("8")
    assert policy.told == ["generate", "begin_update", "update_bucket", "end_update"] and beside.told == ["generate"]
    assert both.score([1, 2]) == [0.5] and both.weight_version() == "policy"


def test_both_live_sleep_and_are_cut_short_together():
    policy, beside = Recording("policy"), Recording("beside")
    both = TwoEngines(policy, beside)
    for verb in ("launch", "wait_ready", "check", "sleep", "wake", "kill", "close"):
        getattr(both, verb)()
    asyncio.run(both.abort())
    asyncio.run(both.close_requests())
    assert policy.told == beside.told and len(policy.told) == 9


@pytest.mark.parametrize("failing", ["policy", "beside"])
@pytest.mark.parametrize("verb", ["check", "wake"])
def test_when_either_fails_both_are_ended_and_both_are_started_again(failing, verb):
    policy, beside = (Recording(name, verb if name == failing else "") for name in ("policy", "beside"))
    crew = Crew([TwoEngines(policy, beside)], max_restarts=1)
    crew.each(lambda engine: getattr(engine, verb)())
    assert crew.num_lost == 1 and f"{failing} cannot {verb}" in crew.last_words()[0]
    assert "kill" in policy.told and "kill" in beside.told
    crew.revive()
    assert crew.num_lost == 0 and policy.told[-2:] == beside.told[-2:] == ["launch", "wait_ready"]


def test_one_that_cannot_be_ended_does_not_keep_the_other_alive():
    policy, beside = Recording("policy", "kill"), Recording("beside")
    with pytest.raises(EngineError, match="policy cannot kill"):
        TwoEngines(policy, beside).kill()
    assert beside.told == ["kill"]
