"""What ranks end with, besides 0, 1 (an error) and 2 (a recipe that cannot be run)."""

from __future__ import annotations

INTERRUPTED = 75
"""Asked to end, and saved: EX_TEMPFAIL, "try again later"."""

HUNG = 79
"""Ended by the watchdog, because the run made no progress."""
