"""A row's tensors: who sees whom, at which position, and which position predicts which token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.game.records import Trajectory
from megatron_spice.policy.packing import Block
from megatron_spice.policy.rows import row_tensors

lengths = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1, max_size=3)


@given(lengths)
def test_each_token_sees_its_own_sequence_up_to_itself(shape):
    row, sequences, token = [], [], 0
    for prompt_length, completions in shape:
        prompt = tuple(range(token, token + prompt_length))
        token += prompt_length
        members = []
        for length in completions:
            completion = tuple(range(token, token + length))
            token += length
            members.append(Trajectory("challenger", prompt, completion, (0.0,) * length, 1.0, 0.0))
            sequences.append(prompt + completion)
        row.append(Block(prompt, tuple(members)))
    tensors = row_tensors(tuple(row), "cpu")
    place = {id: index for index, id in enumerate(tensors.ids_s[:token].tolist())}
    for sequence in sequences:
        for position, id in enumerate(sequence):
            assert tensors.positions_s[place[id]] == position
            seen = {other for other, index in place.items() if tensors.mask_ss[place[id], index]}
            assert seen == set(sequence[: position + 1]) or id not in sequence
    assert tensors.mask_ss.any(1).all(), "a token that sees nothing makes its softmax NaN"
    predicted_from = dict(zip(tensors.labels_c.tolist(), tensors.source_c.tolist()))
    for sequence, block in ((s, b) for b in row for s in sequences if s[: len(b.prompt_ids)] == b.prompt_ids):
        for before, label in list(zip(sequence, sequence[1:]))[len(block.prompt_ids) - 1 :]:
            assert predicted_from[label] == place[before]


def test_an_empty_row_is_one_token_that_counts_for_nothing():
    tensors = row_tensors((), "cpu")
    assert tensors.ids_s.tolist() == [0] and tensors.mask_ss.tolist() == [[True]] and tensors.labels_c.numel() == 0


def test_weights_and_advantages_follow_the_completion_tokens():
    block = Block((1, 2), (
        Trajectory("challenger", (1, 2), (3, 4), (-1.0, -2.0), 0.5, 0.0, weight=0.1),
        Trajectory("reasoner", (1, 2), (5,), (-3.0,), -0.5, 0.0, weight=0.2),
    ))  # fmt: skip
    tensors = row_tensors((block,), "cpu")
    torch.testing.assert_close(tensors.weights_c, torch.tensor([0.1, 0.1, 0.2]))
    assert tensors.advantages_c.tolist() == [0.5, 0.5, -0.5]
    assert tensors.rollout_logprobs_c.tolist() == [-1.0, -2.0, -3.0]
    assert tensors.is_challenger_c.tolist() == [True, True, False]
    assert tensors.source_c.tolist() == [1, 2, 1]
