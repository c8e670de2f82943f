"""The world group, and what all groups made after it have in common."""

from __future__ import annotations

from pathlib import Path

from ranks import run_ranks

ON_RANKS = Path(__file__).with_name("groups_on_ranks.py")


def test_groups_share_a_loop_and_do_not_mix():
    """Each group's own loop would wake a hundred times a second for nothing, and Megatron makes some twenty groups a rank."""
    for result in run_ranks(3, ON_RANKS, "use_many_groups", 6):
        assert result == {"wrong": [], "loops": 1}
