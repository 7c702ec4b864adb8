"""Rounding to nearest, without calibration."""

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.gptq.loss import lost_share
from rsq_stream.algorithm.gptq.solver import Solution
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.runtime.worker_pool import Pool


def round_to_nearest(
    weight_OI: Float[Tensor, "O I"],
    grid: Grid,
    group_size: int,
    *,
    tile_rows: int,
    pool: Pool,
) -> Solution:
    """Quantize a linear by rounding alone: method ``rtn``."""
    inputs = weight_OI.shape[1]
    columns = inputs if group_size == -1 else group_size

    def one(weight_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight_LC = weight_RI.reshape(-1, columns)
        scale_L, zero_L = grid.search(weight_LC)
        code_LC = grid.nearest(weight_LC, scale_L, zero_L).to(torch.uint8)
        shape = (weight_RI.shape[0], -1)
        return code_LC.reshape(shape), scale_L.reshape(shape), zero_L.reshape(shape)

    parts = pool.map(one, weight_OI.split(tile_rows))
    code_OI, scale_OG, zero_OG = (torch.cat(part) for part in zip(*parts, strict=True))
    error_OI = weight_OI - grid.decode(code_OI, scale_OG, zero_OG)
    lost, energy = (
        float(x_OI.double().square().sum()) for x_OI in (error_OI, weight_OI)
    )
    error = lost_share(lost, energy)
    return Solution(
        code_OI=code_OI,
        scale_OG=scale_OG,
        zero_OG=zero_OG,
        relative_error=error,
        rounding_error=error,
        kept_rounding=False,
    )
