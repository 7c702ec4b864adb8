"""The loss of a tile of rows against the Hessian: tr(E H E^T), H undamped."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rsq_stream.algorithm.factor import Factor, wide_blocks

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
    """Compute e H e^T of each row: by wide blocks of columns, twice what is below."""
    tiles, matrix_II = factor.tiles, factor.matrix_II
    tile = tiles[0].shape[0]
    total_N = torch.zeros(
        error_NI.shape[0], dtype=torch.float64, device=error_NI.device
    )
    for start, end in wide_blocks(error_NI.shape[1], tile):
        product_NW = (2 * error_NI[:, end:]) @ matrix_II[end:, start:end]
        for at in range(start, end, tile):
            own, after = slice(at, min(at + tile, end)), slice(at + tile, end)
            product_NC = product_NW[:, at - start : own.stop - start]
            product_NC.addmm_(error_NI[:, own], tiles[at // tile])
            product_NC.addmm_(error_NI[:, after], matrix_II[after, own], alpha=2)
        total_N += (error_NI[:, start:end] * product_NW).sum(1, dtype=torch.float64)
    return total_N
