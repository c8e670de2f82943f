"""What may take for ever is not waited for: a pipe that nobody reads stands for it."""

from __future__ import annotations

import os
import time

import pytest

from megatron_spice.cluster.aside import Aside, NoAnswer, answer


def test_an_answer_an_error_and_none():
    assert answer(lambda: 3, 5.0) == 3
    with pytest.raises(KeyError, match="no such"):
        answer(lambda: {}["no such"], 5.0)
    read, write = os.pipe()
    with pytest.raises(NoAnswer):
        answer(lambda: os.read(read, 1), 0.1)
    os.write(write, b".")


def test_things_are_done_in_order_whatever_fails_and_one_that_blocks_stops_what_is_behind_it():
    aside, done = Aside(), []
    for action in (lambda: done.append(1), lambda: 1 / 0, lambda: done.append(2)):
        aside.later(action)
    assert aside.wait(5.0) and done == [1, 2]
    read, write = os.pipe()
    aside.later(lambda: os.read(read, 1))
    aside.later(lambda: done.append(3))
    began = time.monotonic()
    assert not aside.wait(0.1) and time.monotonic() - began < 2.0 and done == [1, 2]
    os.write(write, b".")
    assert aside.wait(5.0) and done == [1, 2, 3]
