"""A test skips without what it needs, except where SPICE_MUST_HAVE names it (`slurm,chromium`): there it runs, and fails.

.ci/run names what it has for certain: without Slurm a run of all tests would otherwise be as green as with it."""

from __future__ import annotations

import os


def may_lack(name: str) -> bool:
    """Whether a test that needs it may skip."""
    return name not in os.environ.get("SPICE_MUST_HAVE", "").split(",")
