"""Plain rounding of a block of columns to the integers of each row's grid."""

from typing import NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rsq_stream.ops.column_layout import nearest_codes


class Rounded(NamedTuple):
    """A block of columns after rounding."""

    code_RC: UInt8[Tensor, "R C"]
    error_RC: Float[Tensor, "R C"]
    """weight - level[code]."""


def round_columns(
    weight_RC: Float[Tensor, "R C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> Rounded:
    """Round columns that share one scale per row; ``level_RL`` is as for ``sweep``."""
    if weight_RC.is_cuda:
        return round_columns_naive(weight_RC, scale_R, zero_R, level_RL)
    weight_CR = weight_RC.T.contiguous()
    code_CR = torch.empty_like(weight_CR, dtype=torch.uint8)
    error_CR = torch.empty_like(weight_CR)
    _round(
        weight_CR.numpy(),
        (1.0 / scale_R).numpy(),
        zero_R.contiguous().numpy(),
        level_RL.contiguous().numpy(),
        code_CR.numpy(),
        error_CR.numpy(),
    )
    return Rounded(code_CR.T, error_CR.T)


def round_columns_naive(
    weight_RC: Float[Tensor, "R C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> Rounded:
    """Do the same, all at once, on any device."""
    code_RC = torch.round(weight_RC * (1.0 / scale_R)[:, None]).add_(zero_R[:, None])
    code_RC = code_RC.clamp_(0, level_RL.shape[1] - 1).to(torch.uint8)
    return Rounded(code_RC, weight_RC - level_RL.gather(1, code_RC.long()))


@numba.njit(nogil=True, cache=True)
@no_type_check
def _round(  # pragma: no cover - compiled
    weight: np.ndarray,
    inverse: np.ndarray,
    zero: np.ndarray,
    level: np.ndarray,
    code: np.ndarray,
    error: np.ndarray,
) -> None:
    # Columns lie in rows here: each step is a run along the rows of the linear.
    columns, rows = weight.shape
    chosen = np.empty(rows, dtype=np.uint32)
    for k in range(columns):
        nearest_codes(weight[k], inverse, zero, level.shape[1] - 1, chosen)
        for r in range(rows):
            code[k, r] = chosen[r]
            error[k, r] = weight[k, r] - level[r, chosen[r]]
