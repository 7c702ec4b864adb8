"""The loss of a tile of rows against the Hessian: tr(E H E^T), H undamped."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rsq_stream.algorithm.factor import Factor

_FEW_ROWS = 256
"""Up to so many rows, several matrices are put below each other: a product of few
rows is bound by reading H."""


def weighted_losses(
    parts: Sequence[Float[Tensor, "R I"]], factor: Factor
) -> Float64[Tensor, "S"]:
    """Compute tr(E H E^T) of each part, with fp64 sums, from the lower triangle."""
    rows = parts[0].shape[0]
    stacks = [torch.cat(list(parts))] if rows <= _FEW_ROWS else parts
    loss_N = torch.cat([_row_losses(stack_NI, factor) for stack_NI in stacks])
    return loss_N.reshape(len(parts), rows).sum(1)


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
        product_NW = torch.addmm(
            error_NW @ block_WW, error_NI[:, end:], below_WW, alpha=2
        )
        total_N += (error_NW * product_NW).sum(1, dtype=torch.float64)
        start = end
    return total_N
