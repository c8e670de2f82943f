"""A row's tensors: who sees whom, at which position, and which position predicts which token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_spice.game.records import Trajectory
from megatron_spice.policy.packing import Block
from megatron_spice.policy.rows import gathered_order, padded_length, row_tensors

lengths = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1, max_size=3)


def _row(shape):
    """A row of unique token ids counted from 0 in order of place, and its sequences."""
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
    return tuple(row), sequences, token


def _attends(codes):
    """[k, k]: the definition, token by token, with rows and columns in order of place."""
    by_place = sorted(codes.tolist(), key=lambda code: code[2])
    return [
        [mine[0] == other[0] and other[1] in (-1, mine[1]) and other[2] <= mine[2] for other in by_place] for mine in by_place
    ]


@given(lengths, st.integers(1, 3), st.integers(0, 5))
def test_each_token_sees_its_own_sequence_up_to_itself(shape, context, extra):
    row, sequences, count = _row(shape)
    length = padded_length(count + extra, 2 * context)
    parts = [row_tensors(row, "cpu", length, rank, context) for rank in range(context)]
    assert all(torch.equal(part.codes_k3, parts[0].codes_k3) for part in parts)
    attends = _attends(parts[0].codes_k3)
    for sequence in sequences:
        for position, id in enumerate(sequence):
            seen = {other for other in range(length) if attends[id][other]}
            # A prompt's token is in several sequences and sees what they have in common.
            assert seen == set(sequence[: position + 1])
    for padding in range(count, length):
        assert [other for other in range(length) if attends[padding][other]] == [padding]

    place = parts[0].codes_k3[:, 2].tolist()
    assert sorted(place) == list(range(length))
    ids = torch.cat([part.ids_s for part in parts]).tolist()
    positions = torch.cat([part.positions_s for part in parts]).tolist()
    assert all(ids[index] == at for index, at in enumerate(place) if at < count)
    for sequence in sequences:
        for position, id in enumerate(sequence):
            assert positions[place.index(id)] == position
    predicted_from = {}
    for part in parts:
        for label, source in zip(part.labels_c.tolist(), part.source_c.tolist()):
            assert label not in predicted_from, "a token is predicted on one rank only"
            predicted_from[label] = part.ids_s[source].item()
    prompts = {id for block in row for id in block.prompt_ids}
    expected = {label: before for s in sequences for before, label in zip(s, s[1:]) if label not in prompts}
    assert predicted_from == expected


@given(lengths)
def test_sequences_have_lengths_only_where_nothing_is_shared(shape):
    row, sequences, count = _row(shape)
    tensors = row_tensors(row, "cpu", count + 3)
    if any(len(completions) > 1 for _, completions in shape):
        assert tensors.lengths is None
    else:
        assert tensors.lengths == (*map(len, sequences), 3)


def test_context_ranks_share_early_and_late_tokens():
    assert gathered_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


def test_an_empty_row_is_padding():
    tensors = row_tensors((), "cpu")
    assert tensors.ids_s.tolist() == [0] and tensors.labels_c.numel() == 0 and tensors.codes_k3[:, 0].tolist() == [-1]
    assert row_tensors((), "cpu", 4).codes_k3[:, 0].unique().numel() == 4, "padding sees only itself"


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
