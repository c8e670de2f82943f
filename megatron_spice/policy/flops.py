"""Model floating-point operations of an update, for figures that can be compared with a machine's ceiling.

Only what the mathematics asks for is counted: forward, and twice that for backward; recomputation, padding, the optimiser
and the second product for logits are not. What `packing.Cost` says of a row:

    6 x weights of the layers x tokens              a mixture counts the experts that a token goes through
    12 x layers x heads x head size x pairs         of tokens that attend to each other, the masked half left out
    6 x hidden x vocabulary x completion tokens     the output matrix meets nothing else

after Chinchilla's appendix F (arXiv 2203.15556), which counts every pair and the logits of every token.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.policy.packing import Cost, Row, row_cost


def update_flops(architecture: ModelArchitecture, rows: Iterable[Row]) -> float:
    """Floating-point operations of computing `rows` forward and backward once."""
    cost = Cost.of(architecture)
    return 3.0 * sum(row_cost(row, cost) for row in rows)
