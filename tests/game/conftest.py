from __future__ import annotations

import asyncio

import pytest

from megatron_spice.config.schema import VerifierConfig
from megatron_spice.game.records import Task
from megatron_spice.game.verify import Verifier


@pytest.fixture(scope="session")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def verifier(loop):
    # A long timeout: a loaded machine must not turn a right answer into a timeout here.
    verifier = Verifier(VerifierConfig(workers=1, timeout=30.0))
    loop.run_until_complete(verifier.start())
    yield verifier
    loop.run_until_complete(verifier.close())


@pytest.fixture
def judge(loop, verifier):
    def judge(answer_type, gold, answer, question="What is it?"):
        return loop.run_until_complete(verifier.verify(Task(question, gold, answer_type), answer))

    return judge
