"""The loss of a tile of rows against the Hessian: tr(E H E^T), H undamped."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rsq_stream.algorithm.gptq.ldl import Factor
from rsq_stream.ops.column_layout import empty, plus_product, product

_COLUMNS = 512
FEW_ROWS = 256
"""Up to so many rows, several matrices are put below each other: a product of few
rows is bound by reading H."""


def weighted_losses(
    parts: Sequence[Float[Tensor, "R I"]], factor: Factor
) -> Float64[Tensor, "S"]:
    """Compute tr(E H E^T) of each part from the lower triangle.

    What blocks of columns give a row is added up in fp64.
    """
    rows = parts[0].shape[0]
    stacks = [_below_each_other(parts)] if rows <= FEW_ROWS else parts
    loss_N = torch.cat([_row_losses(stack_NI, factor) for stack_NI in stacks])
    return loss_N.reshape(len(parts), rows).sum(1)


def squared_norm(error_RI: Float[Tensor, "R I"]) -> Float64[Tensor, ""]:
    """Compute tr(E E^T), summed up in fp64, some columns at a time."""
    parts = error_RI.split(_COLUMNS, dim=1)
    return torch.stack([part_RC.square().sum(1).double() for part_RC in parts]).sum()


def _below_each_other(parts: Sequence[Tensor]) -> Tensor:
    """Put matrices into one, laid out as they are."""
    rows, columns = parts[0].shape
    stack_NI = empty(rows * len(parts), columns, parts[0])
    for number, part_RI in enumerate(parts):
        stack_NI[rows * number : rows * (number + 1)] = part_RI
    return stack_NI


def _row_losses(error_NI: Float[Tensor, "N I"], factor: Factor) -> Float64[Tensor, "N"]:
    """Compute e H e^T of each row: by blocks of columns, twice what is below."""
    total_N = torch.zeros(
        error_NI.shape[0], dtype=torch.float64, device=error_NI.device
    )
    start = 0
    for block_WW in factor.blocks:
        end = start + block_WW.shape[0]
        error_NW = error_NI[:, start:end]
        below_WW = factor.matrix_II[end:, start:end]
        product_NW = plus_product(
            product(error_NW, block_WW), error_NI[:, end:], below_WW, alpha=2
        )
        total_N += (error_NW * product_NW).sum(1)
        start = end
    return total_N


def lost_share(loss: float, energy: float) -> float:
    """Return loss / energy, and 0 where there is no energy to lose."""
    return loss / energy if energy > 0 else 0.0
