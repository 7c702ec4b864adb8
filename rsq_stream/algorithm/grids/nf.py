"""NormalFloat: levels at the quantiles of a normal distribution (QLoRA).

With delta = 0.9677083 the values are the standard normal quantiles of 2**(b-1) points
from 1 - delta to 1/2, the last left out, and of 2**(b-1) + 1 points from 1/2 to delta,
divided by that of delta: from -1 to 1 with an exact 0, one value more above than below
(Dettmers et al., arXiv 2305.14314; 4 bits are their NF4).
"""

import functools
import statistics

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.grids._table import TableGrid
from rsq_stream.algorithm.grids.base import picked, shrinking_shares
from rsq_stream.ops.column_sweep import Swept
from rsq_stream.ops.table import (
    best_table_scale,
    descend_table,
    middles,
    nearest_code,
    sweep_table,
)

_DELTA = 0.9677083


@functools.cache
def normal_values(bits: int) -> Float[Tensor, "L"]:
    """Give the 2**bits values, ascending; at 2 bits -1, 0, 0.3379, 1."""
    quantile = statistics.NormalDist().inv_cdf
    half = 1 << (bits - 1)
    below = [1 - _DELTA + (_DELTA - 0.5) * i / (half - 1) for i in range(half - 1)]
    above = [0.5 + (_DELTA - 0.5) * i / half for i in range(half + 1)]
    values = [quantile(share) for share in (*below, *above)]
    return torch.tensor(values, dtype=torch.float64).div(quantile(_DELTA)).float()


class NormalFloat(TableGrid):
    """The NormalFloat grid; a negative scale mirrors it, at no cost in the format."""

    @property
    def values(self) -> Float[Tensor, "L"]:
        """What the codes stand for, ascending."""
        return normal_values(self.bits)

    def search(
        self, target_RC: Float[Tensor, "R C"]
    ) -> tuple[Float[Tensor, "R"], Float[Tensor, "R"]]:
        """Give scale and zero point (none: 0) per row, the scale exact as stored.

        Candidates are the largest weight times 1.00, 0.99, ..., as in ``Grid.search``.
        """
        full_R = target_RC.abs().amax(dim=1)
        shares_P = shrinking_shares(self.clip_steps, target_RC.device)
        scale_RP = self.stored_sizes(full_R[:, None] * shares_P)
        best_R = best_table_scale(
            target_RC,
            scale_RP,
            self.values.to(target_RC.device),
            self.clip_exponent,
            self.signed_scales,
        )
        scale_R = picked(scale_RP, best_R, mirrored=self.signed_scales)
        return scale_R, torch.zeros_like(scale_R)

    def codes(
        self, value_RC: Float[Tensor, "R C"], scale_R: Float[Tensor, "R"]
    ) -> Tensor:
        """Give the nearest codes, as whole numbers."""
        middle_M = middles(self.values.to(value_RC.device))
        return nearest_code(value_RC * (1.0 / scale_R)[:, None], middle_M)

    def sweep(
        self,
        target_RC: Tensor,
        weight_RC: Tensor,
        upper_CC: Tensor,
        scale_R: Tensor,
        zero_R: Tensor,
        level_RL: Tensor,
    ) -> Swept:
        """Quantize a block of columns."""
        del zero_R
        value_L = self.values.to(target_RC.device)
        return sweep_table(target_RC, weight_RC, upper_CC, scale_R, value_L, level_RL)

    def descend(
        self,
        code_RC: Tensor,
        pull_RC: Tensor,
        hessian_CC: Tensor,
        scale_R: Tensor,
        zero_R: Tensor,
        level_RL: Tensor,
    ) -> Tensor:
        """Give better codes for a block of columns."""
        del zero_R
        value_L = self.values.to(code_RC.device)
        return descend_table(code_RC, pull_RC, hessian_CC, scale_R, value_L, level_RL)
