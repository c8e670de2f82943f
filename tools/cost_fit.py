"""A device's constants from measured cases of the cost model (`cost_cases.py`).

`fit` finds the constants of least squared relative error; a weak pull to what was assumed before (`cost_assumed.json` for CPUs) keeps
those in place that the cases cannot tell apart. `calibration` makes a device's file of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmark_options import columns

from megatron_spice.cost.device import RATES, SHARED_BY_THREADS, TIMES, Device, Work

ASSUMED = Path(__file__).with_name("cost_assumed.json")
"""What a CPU's constants are taken to be before anything is measured."""
PRIOR, FIRM = 1e-3, 1e-1
"""Weight of the square of a constant's logarithmic distance from what was assumed: ten times as much is like a case off by 7 %. That
of `KNOWN` is larger: twice as much is like a case off by 22 %."""
KNOWN = ("elements", "optimizer")
"""Memory traffic, too little of any small case to be found by it, and of large models more. A processor's bandwidth is known."""
STEPS = 1000
SEEN, STAYS = 0.03, 0.2
"""A constant is measured if it is such a share of at least one case, and moves by less than so much where it is assumed to be three
times what it is: what cases cannot tell from others, and what is held, is not."""


@dataclass(frozen=True)
class Case:
    """What was measured: `seconds` for this work on so many threads; `calibrates`: the constants may come from it."""

    name: str
    part: str
    work: Work
    threads: int
    seconds: float
    calibrates: bool

    def off(self, device: Device) -> float:
        """Prediction / measurement - 1."""
        return device.seconds(self.work, self.threads) / self.seconds - 1.0


def fit(cases: Sequence[Case], before: Device) -> dict[str, float]:
    """Seconds for one unit of each kind of work that these cases have: those of the least sum of squares of relative errors and,
    weighted by `PRIOR` or `FIRM`, of the logarithms of how far each is from what it was `before`. Levenberg's and Marquardt's method over the
    logarithms, so that none is below zero and a tenth is as far away as ten times."""
    import numpy as np

    names = sorted({name for case in cases for name, amount in case.work.items() if amount})
    known = np.array([before.constants[name].seconds for name in names])
    shares = np.array([[_amount(case, name) / case.seconds for name in names] for case in cases]) * known
    hold = np.diag(np.sqrt([FIRM if name in KNOWN else PRIOR for name in names]))

    def off(logarithms: Any) -> Any:
        return np.concatenate([shares @ np.exp(logarithms) - 1.0, hold @ logarithms])

    found, damping = np.zeros(len(names)), 1.0
    for _ in range(STEPS):
        residual, slopes = off(found), np.vstack([shares * np.exp(found), hold])
        step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(names)), -slopes.T @ residual).clip(-1.0, 1.0)
        better = np.square(off(found + step)).sum() < np.square(residual).sum()
        found, damping = (found + step, damping / 3.0) if better else (found, damping * 4.0)
        if np.abs(step).max() < 1e-9:
            break
    return dict(zip(names, (np.exp(found) * known).tolist()))


def _amount(case: Case, constant: str) -> float:
    return case.work.get(constant, 0.0) / (case.threads if constant in SHARED_BY_THREADS else 1)


def calibration(name: str, cases: Sequence[Case], before: Device, source: str) -> dict[str, Any]:
    """A device's file: constants that the cases give, and the others as they were in `before`."""
    constants: dict[str, Any] = {}
    for part in ("train", "play", "wake", "sync", "save"):
        chosen = [case for case in cases if case.calibrates and case.part == part]
        if part == "sync":
            known = constants.get("hand_over", {}).get("value")
            if known is not None:
                chosen = [_less(case, "hand_over", known) for case in chosen]
        for constant, seconds in (fit(chosen, before) if chosen else {}).items():
            unit = (RATES | TIMES)[constant]
            value = seconds if unit == "s" else 1.0 / seconds
            share = max(_amount(case, constant) * seconds / case.seconds for case in chosen)
            seen = share >= SEEN and abs(_assumed_thrice(chosen, before, constant) / seconds - 1.0) < STAYS
            words = source if seen else f"{source}, which leave it open: near what is assumed"
            constants[constant] = {"value": float(f"{value:.4g}"), "unit": unit, "source": words, "measured": seen}
    kept = {
        each: {"value": old.value, "unit": old.unit, "source": old.source, "measured": old.measured}
        for each, old in before.constants.items() if each not in constants
    }  # fmt: skip
    return {"device": name, "on_cpu": before.on_cpu, "constants": {each: (constants | kept)[each] for each in RATES | TIMES}}


def _assumed_thrice(cases: Sequence[Case], before: Device, constant: str) -> float:
    """What the constant would be found to be."""
    old = before.constants[constant]
    return fit(cases, replace(before, constants={**before.constants, constant: replace(old, value=3.0 * old.value)}))[constant]


def _less(case: Case, constant: str, seconds: float) -> Case:
    """The case without what a known constant takes of it."""
    work = {name: amount for name, amount in case.work.items() if name != constant}
    return Case(case.name, case.part, work, case.threads, case.seconds - case.work.get(constant, 0.0) * seconds, case.calibrates)


def table(cases: Sequence[Case], device: Device) -> str:
    """Each case, measured and predicted."""
    rows = [["part", "case", "", "measured s", "predicted s", "off"]]
    for case in cases:
        predicted = device.seconds(case.work, case.threads)
        rows.append([case.part, case.name, "" if case.calibrates else "held out", f"{case.seconds:.3f}", f"{predicted:.3f}", f"{case.off(device):+.1%}"])
    return columns(rows)
