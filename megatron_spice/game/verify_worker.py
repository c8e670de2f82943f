"""The process in which Math-Verify runs, one request at a time: `python -m megatron_spice.game.verify_worker TIMEOUT
MEMORY_MB`.

Reading and comparing expressions may take for ever and all memory (`9^{9^{9^9}}`), and no timeout inside a process
can be relied on to end that. So this process expects to be killed: by the parent when a request takes too long, by
its own alarm should the parent not come to it, by the kernel when its parent dies. It keeps no state worth saving.
Memory past the limit is refused; sympy swallows that in most places, and what then cannot be computed is not equal.

A request is a JSON line {"gold": latex, "prediction": latex or null}, null asking only whether gold can be read; the
answer is {"result": true or false}. The first line out is {"ready": true}.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_ALARM_SLACK = 1.0  # seconds after the parent should have killed us


def _confine(memory_mb: int, parent: int) -> None:
    """Limits this process and ties its life to the parent's.

    The prctl is Linux's; elsewhere the end of standard input ends an idle worker and the alarm a busy one.
    """
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        pass
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process, even inside C code


def _read(latex: str) -> list[Any]:
    """What Math-Verify reads in one whole LaTeX expression, without the fall-back to its text."""
    from math_verify import LatexExtractionConfig, parse

    parsed = parse(f"${latex}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    return [value for value in parsed if not isinstance(value, str)]


def _decide(gold_latex: str, prediction_latex: str | None) -> bool:
    """Whether both are readable and equal, gold first as Math-Verify wants it. Its own timeouts are off: ours rule."""
    from math_verify import verify

    gold = _read(gold_latex)
    if prediction_latex is None or not gold:
        return bool(gold)
    prediction = _read(prediction_latex)
    return bool(prediction) and bool(verify(gold, prediction, timeout_seconds=None))


def main() -> None:
    """Serves requests until standard input ends."""
    timeout, memory_mb, parent = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    _confine(memory_mb, parent)
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    assert _decide("x^2+2x", "x(x+2)")  # loads everything, so that the first real request is not charged for it
    answers.write('{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout + _ALARM_SLACK)
        try:
            result = _decide(request["gold"], request["prediction"])
        except MemoryError:
            os._exit(2)
        except Exception:  # whatever a parser of arbitrary text may raise: it is not an equal expression
            result = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps({"result": result}) + "\n")


if __name__ == "__main__":
    main()
