"""What work costs on a device: constants with unit and source, read from a file that people and `benchmark.py calibrate` write.

Formulas elsewhere count work (`{"matmul": 3e12, "row_layers": 40, ...}`); a constant says how fast it goes: a rate in FLOP/s
or B/s, or seconds each. Seconds are the sum over the work, so that the constants of a machine follow from measured cases by
least squares, and a reader sees which part of a prediction comes from where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_spice.config.errors import ConfigError

Work = dict[str, float]

RATES = {
    "matmul": "FLOP/s",  # of the layers' and the output matrix's products in an update, as achieved
    "matmul_fp8": "FLOP/s",  # those of the layers, where they are in FP8
    "attention": "FLOP/s",
    "elements": "B/s",  # norms, activations, rotations: memory traffic in an update
    "optimizer": "B/s",  # weights, gradients and moments that a step reads and writes
    "link": "B/s",  # between ranks of a node, each direction
    "network": "B/s",  # between nodes, of one rank
    "engine_matmul": "FLOP/s",  # prompts
    "engine_memory": "B/s",  # weights that a step of decoding reads
    "engine_cache": "B/s",  # keys and values that it reads: on a CPU they are gathered first
    "copy": "B/s",  # weights on their way to an engine
    "save_copy": "B/s",  # a rank's state into host memory: what an iteration waits for
    "save_write": "B/s",  # to the disk, beside the next iteration
    "exchange": "B/s",  # episodes that every rank reads
}
TIMES = {
    "row_layer": "s",  # of a layer and micro-batch besides its arithmetic, there and back
    "row": "s",  # of a micro-batch
    "update": "s",  # of an optimiser step
    "message": "s",  # latency of one transfer
    "engine_step": "s",  # of decoding, for the whole batch
    "engine_sequence": "s",  # of decoding, for each sequence and step
    "engine_request": "s",
    "push": "s",  # of beginning and ending the weights' way to an engine
    "hand_over": "s",  # sleep, wake, drain and barriers of one hand-over between engines and policy
    "check": "s",  # scoring the probe text on both sides after a sync
    "save": "s",  # of beginning a save
    "barrier": "s",  # of all ranks together, for each doubling of their number
}
SHARED_BY_THREADS = ("matmul", "matmul_fp8", "attention", "elements")
"""Rates of one core on a CPU: a rank with several threads is so many times as fast."""


@dataclass(frozen=True, slots=True)
class Constant:
    """`value` in `unit`; `source` says where it is from, `measured` whether on such a device by this project."""

    value: float
    unit: str
    source: str
    measured: bool

    @property
    def seconds(self) -> float:
        """Seconds for one unit of work."""
        return self.value if self.unit == "s" else 1.0 / self.value


@dataclass(frozen=True, slots=True)
class Device:
    """The constants of one kind of device. `on_cpu`: its ranks share the cores of a node."""

    name: str
    on_cpu: bool
    constants: Mapping[str, Constant]

    def seconds(self, work: Mapping[str, float], threads: int = 1) -> float:
        """How long some work takes on one device, or on so many cores of a CPU."""
        return sum(
            amount * self.constants[name].seconds / (threads if name in SHARED_BY_THREADS else 1) for name, amount in work.items()
        )


def read_device(path: Path) -> Device:
    """A device's file.

    Raises:
        ConfigError: it cannot be read, or a constant is missing, unknown, in another unit or not above zero.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        constants = {name: Constant(**about) for name, about in found["constants"].items()}
        device = Device(found["device"], bool(found["on_cpu"]), constants)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no calibration ({type(error).__name__}: {error}); make one: tools/benchmark.py calibrate") from error
    units, problems = RATES | TIMES, []
    if missing := sorted(set(units) - set(constants)):
        problems.append(f"{path} lacks {', '.join(missing)}; make it anew: tools/benchmark.py calibrate")
    for name, constant in constants.items():
        if constant.unit != units.get(name):
            problems.append(f"{path}: {name} is in {constant.unit}, it is known in {units.get(name, 'no unit: leave it out')}")
        elif not constant.value >= 0 or (constant.unit != "s" and constant.value == 0):
            problems.append(f"{path}: {name}={constant.value} {constant.unit} must be above zero")
    if problems:
        raise ConfigError(problems)
    return device


def default_file(kind: str) -> Path:
    """The file that comes with the package, for "cpu" or "cuda"."""
    return Path(__file__).parent / "devices" / {"cpu": "cpu.json", "cuda": "h100.json"}[kind]


def scaled(work: Mapping[str, float], factor: float) -> Work:
    """So many times the work."""
    return {name: amount * factor for name, amount in work.items()}


def added(*works: Mapping[str, float]) -> Work:
    """All of it."""
    total: Work = {}
    for work in works:
        for name, amount in work.items():
            total[name] = total.get(name, 0.0) + amount
    return total
