"""The work of the policy's update on its busiest rank: arithmetic, memory, messages.

The rows are those that `policy/packing.py` plans, dealt to data-parallel ranks. With p stages, v chunks on each and m rows,
the last stage, which also has the output matrix, computes its m rows, and the pipeline fills and drains with (p - 1) / v rows of
the other stages: a bubble of (p - 1) / (m v) of the rows' time.

For each row of n tokens and each of a stage's layers (t tensor-parallel ranks, c context-parallel):
    matmul      3 x 2 x weights x n / (t c); the output matrix 4 x: its logits are computed again for backward
    attention   3.5 x 4 x heads x head size x pairs / (t c): backward has five products where forward has two; masks are
                skipped in tiles, so `TILE` more keys a token than attend are computed
    elements    traffic of norms, rotations and activation: 40 h + 12 f bytes a token, there and back (16-bit numbers)
    link        10 transfers of n h numbers with sequence parallelism, 8 without, (t - 1) / t of each: gathers and reductions
                around attention and MLP, there and back; what a matrix split by columns reads is gathered again for its gradient
For each row besides:
    elements    LOGIT bytes for each logit, ADDED for each number that the rank holds: its gradient is added to the sum
Once an update:
    optimizer   28 bytes for each number stepped (gradient, master weight, two moments), 10 for each held
    link or network  float32 gradients reduced and weights gathered: (4 + bytes a weight)(d - 1) / d of what a rank holds
Full recomputation adds a third of the layers' arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.layout import ParallelLayout
from megatron_spice.config.schema import PolicyConfig
from megatron_spice.cost.device import Work, added, scaled
from megatron_spice.policy.packing import Cost, Row, num_tokens, row_cost
from megatron_spice.policy.parameter_count import rank_parameters

TILE = 128
LOGIT = 12.0  # written and read again as 16-bit numbers, on the way there, and twice on the way back
ADDED = 10.0  # float32 sums read and written, a 16-bit gradient read


def update_work(
    architecture: ModelArchitecture, config: PolicyConfig, layout: ParallelLayout, rows: Sequence[Row], ranks_per_node: int
) -> Work:
    """One optimiser step on the rows of the busiest data-parallel rank.

    Args:
        ranks_per_node: beyond so many, data-parallel transfers go over the network.
    """
    stages = layout.pipeline
    # Interleaved stages need rows of one length: short and empty ones are filled up, and computed so.
    filled = max(map(num_tokens, rows), default=0) if layout.equal_rows else 0
    rows = [row for row in rows if row or filled]
    held = [rank_parameters(architecture, layout, stage).held for stage in range(stages)]

    def through(row: Row, stage: int) -> Work:
        tokens = max(filled, num_tokens(row))
        work = (_row_work(architecture, config, layout, row, tokens, chunk) for chunk in _chunks(layout, stage))
        return added(*work, {"elements": ADDED * held[stage]})

    total = added(*(through(row, stages - 1) for row in rows))
    for stage in range(stages - 1 if rows else 0):
        filling = added(*(through(row, stage) for row in rows))
        total = added(total, scaled(filling, 1.0 / (len(rows) * layout.virtual)))
    return added(total, step_work(architecture, config, layout, ranks_per_node))


def step_work(architecture: ModelArchitecture, config: PolicyConfig, layout: ParallelLayout, ranks_per_node: int) -> Work:
    """What an update takes besides its rows: gradients' way, the optimiser, weights' way back."""
    numbers = max((rank_parameters(architecture, layout, stage) for stage in range(layout.pipeline)), key=lambda each: each.held)
    data = layout.data * layout.context
    weight_bytes = 4 if config.precision == "fp32" else 2
    travelling = (4.0 + weight_bytes) * numbers.held * (data - 1) / data
    far = layout.tensor * data > ranks_per_node
    return {
        "update": 1.0, "optimizer": 28.0 * numbers.stepped + 10.0 * numbers.held, "network" if far else "link": travelling,
        "message": 4.0 * (data - 1),
    }  # fmt: skip


def _chunks(layout: ParallelLayout, stage: int) -> range:
    return range(stage, len(layout.chunk_layers), layout.pipeline)


def _row_work(
    architecture: ModelArchitecture, config: PolicyConfig, layout: ParallelLayout, row: Row, tokens: int, chunk: int
) -> Work:
    """A row, filled up to so many tokens, through one chunk of layers, forward and backward."""
    a, cost = architecture, Cost.of(architecture)
    layers, shared = len(layout.layers_of(chunk)), layout.tensor * layout.context
    part = layers / a.num_layers
    again = 4.0 / 3.0 if config.recompute == "full" else 1.0
    predictions = sum(len(each.completion_ids) for block in row for each in block.trajectories)
    is_last = chunk == len(layout.chunk_layers) - 1
    pairs = row_cost(row, Cost(token=0.0, pair=1.0)) + TILE * tokens
    ffn = a.experts_per_token * a.expert_ffn_hidden_size if a.num_experts else a.ffn_hidden_size
    around = (10.0 if layout.sequence_parallel else 8.0) * layers
    transfers = around * (layout.tensor - 1) / layout.tensor
    boundaries = 2.0 if layout.pipeline > 1 else 0.0
    gathered = 4.0 * layers * (layout.context - 1) / layout.context
    number = 4.0 if config.precision == "fp32" else 2.0
    keys = 2.0 * a.num_query_groups * a.head_dim / layout.tensor
    products = "matmul_fp8" if config.precision == "fp8" else "matmul"
    logits = predictions / shared if is_last else 0.0
    return added({products: 3.0 * again * cost.token * tokens * part / shared, "elements": LOGIT * logits * a.vocab_size}, {
        "matmul": 4.0 * cost.prediction * logits,
        "attention": 3.5 * again * cost.pair * pairs * part / shared,
        "elements": again * (40.0 * a.hidden_size + 12.0 * ffn) * tokens * layers / shared,
        "row_layer": again * layers, "row": 1.0 if is_last else 0.5,
        "link": number * tokens * (a.hidden_size * (transfers + boundaries) + keys * gathered) / layout.context,
        "message": around * (layout.tensor - 1) + boundaries + 4.0 * layers * (layout.context - 1),
    })  # fmt: skip

