"""The memory of a linear while it is solved, from sizes alone."""

from rsq_stream.algorithm.loss import FEW_ROWS
from rsq_stream.config import QuantizationPlan

FP32 = 4
DECODED = 1 << 24
"""Codes that are decoded at a time (``block_solver.py``; packing takes fewer)."""
_DECODED_WIDTH = 5 * FP32
"""Bytes of a code while it is decoded or packed."""
_TILE_COPIES = 5
"""fp32 copies of a tile of rows: weights, errors, those of rounding, codes, products.
Of few rows, three more are put below each other (``loss.py``)."""


def solving_bytes(
    plan: QuantizationPlan,
    outputs: int,
    inputs: int,
    size: int,
    workers: int,
    *,
    on_gpu: bool,
) -> tuple[int, int]:
    """Count what a linear takes beside its weights: where the factor is, and the host.

    First it is solved, against a target of its own where there are two streams or
    another order; then what its codes stand for takes the place of its weights.
    ``size`` is the bytes of a value there.
    """
    whole, rows = outputs * inputs, min(outputs, plan.tile_rows)
    tiles = min(workers, -(-outputs // plan.tile_rows)) * FP32 * rows * inputs
    target = FP32 * whole if plan.act_order or plan.streams > 1 else 0
    copies = _TILE_COPIES + 3 * (rows <= FEW_ROWS)
    corrected = 5 * tiles if plan.streams > 1 else 0
    phases = (
        # A tile's correction on its way into the target, or its own; and all codes.
        (max(corrected, copies * tiles + whole), target),
        # The codes, the weights that they stand for, and some at a time in between.
        ((1 + size) * whole + _DECODED_WIDTH * min(whole, DECODED), 0),
    )
    if on_gpu:
        there, host = zip(*phases, strict=True)
        return max(there), max(host)
    return max(map(sum, phases)), 0
