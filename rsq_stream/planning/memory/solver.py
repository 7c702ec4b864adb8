"""The memory of a linear while it is solved, from sizes alone."""

from rsq_stream.algorithm.gptq.loss import FEW_ROWS
from rsq_stream.algorithm.gptq.solver import DECODED
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.families.base import Linear
from rsq_stream.model.tensor_names import block_prefix

FP32 = 4
_DECODED_WIDTH = 5 * FP32
"""Bytes of a code while it is decoded or packed."""
_TILE_COPIES = 5
"""fp32 copies of a tile of rows: weights, errors, those of rounding, codes, products;
or, before that, its correction's. On an H100, of kept weights, 3.8 were seen.
Of few rows, three more are put below each other (``loss.py``)."""


def solving_bytes(
    plan: QuantizationPlan,
    shape: tuple[int, int],
    size: int,
    workers: int,
    *,
    kept: bool,
) -> int:
    """Count what a linear takes beside its weights, where the factor is.

    First it is solved, each tile of rows against targets that are made for it; then
    what its codes stand for takes the place of its weights. ``size`` is the bytes of a
    value there. Weights that a GPU has ``kept`` are not copied tile by tile.
    """
    outputs, inputs = shape
    whole, tile_rows = outputs * inputs, plan.tile_rows_of(inputs)
    rows = min(outputs, tile_rows)
    tiles = min(workers, -(-outputs // tile_rows)) * FP32 * rows * inputs
    copies = _TILE_COPIES - kept + 3 * (rows <= FEW_ROWS)
    # The codes, the weights that they stand for, and some at a time in between.
    decoding = (1 + size) * whole + _DECODED_WIDTH * min(whole, DECODED)
    return max(copies * tiles + whole, decoding)


def packed_bytes(
    plan: QuantizationPlan, architecture: Architecture, block: int, linear: Linear
) -> int:
    """Count a linear's codes and scales as the output has them; about."""
    outputs, inputs = architecture.shape(linear)
    scheme = plan.scheme(block_prefix(block) + linear.name, inputs)
    if scheme is None:
        return 0
    return outputs * (inputs * scheme.bits // 8 + FP32 * scheme.groups(inputs))
