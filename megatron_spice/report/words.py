"""Numbers and changes in plain words."""

from __future__ import annotations

import math

from megatron_spice.report.change import Change

MINUS = "\u2212"


def number(value: float) -> str:
    """Three significant digits, no exponent unless it is very small; a true minus sign."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value) if abs(value) > 1e-9 else 0.0  # rounding
    if size >= 1000:
        text = f"{value:,.0f}"
    elif 0 < size < 0.0005:
        text = f"{value:.1e}"
    else:
        digits = 0 if size >= 100 or size == int(size) else 1 if size >= 10 else 2 if size >= 1 else 3
        text = f"{value if size else 0.0:.{digits}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", MINUS) if text not in ("-0", "0") else "0"


def share(value: float) -> str:
    """A share in percent; a small one keeps a digit that tells it from nothing."""
    percent = value * 100
    digits = 0 if percent == 0 or abs(percent) >= 9.95 else 1 if abs(percent) >= 0.095 else 2
    text = f"{percent:.{digits}f}".replace("-", MINUS)
    return f"{text}\u00a0%"


def reward(value: float) -> str:
    """Two digits; three where two would hide on which side of zero it is."""
    text = f"{value:.3f}" if 0.0005 <= abs(value) < 0.005 else f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", MINUS)


def signed(value: float, form=reward) -> str:
    """With its sign, also a positive one."""
    text = form(value)
    return text if text.startswith(MINUS) or value == 0 else f"+{text}"


def points(value: float) -> str:
    """A difference of shares, in percentage points."""
    return share(value).removesuffix("\u00a0%") + " points"


def told(change: Change, form=reward, difference=None) -> str:
    """A change as the rest of a sentence: "rose from 0.10 to 0.50 (by 0.40, 95 % interval 0.20 to 0.60)".

    Args:
        form: writes a value; `difference` writes a difference of two (as `form` does, unless given).
    """
    difference = difference or form
    first, last = form(change.first), form(change.last)
    if change.difference == 0 and change.low == change.high:
        return f"stayed at {last}"
    if not math.isfinite(change.low):
        return f"went from {first} to {last} (one seed: no interval)"
    if change.direction:
        size = difference(abs(change.difference))
        low, high = sorted([abs(change.low), abs(change.high)])
        verb = "rose" if change.direction > 0 else "fell"
        return f"{verb} from {first} to {last} (by {size}; 95\u00a0% interval {_span(low, high, difference)})"
    return f"went from {first} to {last}, which may be chance (change: 95\u00a0% interval {_span(change.low, change.high, difference)})"


def _span(low: float, high: float, form) -> str:
    """ "5 to 8 points": the unit once."""
    first, last = form(low), form(high)
    unit = " points"
    return f"{first.removesuffix(unit)} to {last}" if last.endswith(unit) else f"{first} to {last}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def plural(count: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
