"""The sequential heart of the solver: quantize one block of columns, left to right.

For each row: code_k = clamp(round(target_k / s) + z), e_k = w_k - level[code_k],
and every later target of the block gains e_k U[k, j]. Rows are independent.
"""

from typing import NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rsq_stream.ops.column_layout import (
    TOGETHER,
    add_to_later,
    by_columns,
    nearest_codes,
)
from rsq_stream.ops.cuda.cubin_cache import Kernel
from rsq_stream.ops.cuda.launch import (
    ROWS_PER_BLOCK,
    WARP,
    by_rows,
    chunks_of,
    launch,
    output,
    tabled,
)


class Swept(NamedTuple):
    """A block of columns after the sweep."""

    code_RC: UInt8[Tensor, "R C"]
    error_RC: Float[Tensor, "R C"]
    """weight - level[code]."""
    residual_RC: Float[Tensor, "R C"]
    """target - level[code] when its turn came: (E U)[:, c], which costs D[c]."""


def sweep(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> Swept:
    """Quantize a block of columns that share one scale per row.

    Parameters
    ----------
    target_RC
        Weights plus the errors of all earlier blocks.
    weight_RC
        The weights themselves.
    upper_CC
        U of these columns; only what is above the diagonal is read.
    scale_R, zero_R
        Scale (its sign included) and zero point of each row.
    level_RL
        What each code decodes to, rounded as it will be when loaded.
    """
    if target_RC.is_cuda:
        return sweep_kernel(
            target_RC,
            weight_RC,
            upper_CC,
            scale_R=scale_R,
            zero_R=zero_R,
            level_RL=level_RL,
        )
    left_CR = by_columns(target_RC)
    code_CR = np.empty(left_CR.shape, dtype=np.uint8)
    error_CR = np.empty(left_CR.shape, dtype=np.float32)
    _sweep(
        left_CR,
        weight_RC.T.contiguous().numpy(),
        upper_CC.contiguous().numpy(),
        (1.0 / scale_R).numpy(),
        zero_R.contiguous().numpy(),
        level_RL.contiguous().numpy(),
        code_CR,
        error_CR,
    )
    return Swept(*(torch.from_numpy(made).T for made in (code_CR, error_CR, left_CR)))


def sweep_kernel(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
    middle_M: Float[Tensor, "M"] | None = None,
) -> Swept:
    """Do the same with ``kernels/column_sweep.cu``; at most 256 columns.

    With the midpoints of a table, codes are by it (``table.py``).
    """
    rows, columns = target_RC.shape
    target_RC, weight_RC, upper_CC = map(by_rows, (target_RC, weight_RC, upper_CC))
    chunks = chunks_of("sweep", "columns", columns)
    code_RC = output((rows, columns), torch.uint8, target_RC.device)
    error_RC = output((rows, columns), torch.float32, target_RC.device)
    residual_RC = output((rows, columns), torch.float32, target_RC.device)
    launch(
        Kernel("column_sweep", "sweep", (*chunks, *tabled(middle_M))),
        (-(-rows // ROWS_PER_BLOCK), 1, 1),
        ROWS_PER_BLOCK * WARP,
        (
            *(target_RC, target_RC.stride(0)),
            *(weight_RC, weight_RC.stride(0)),
            *(upper_CC, upper_CC.stride(0)),
            *(scale_R.contiguous(), zero_R.contiguous(), level_RL.contiguous()),
            0 if middle_M is None else middle_M.contiguous(),
            *(code_RC, error_RC, residual_RC),
            *(rows, columns, level_RL.shape[1]),
        ),
    )
    return Swept(code_RC, error_RC, residual_RC)


def sweep_naive(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> Swept:
    """Do the same column by column, all rows at once, on any device."""
    residual_RC = target_RC.clone()
    code_RC = torch.empty(
        residual_RC.shape, dtype=torch.uint8, device=residual_RC.device
    )
    error_RC = torch.empty_like(residual_RC)
    top = level_RL.shape[1] - 1
    inverse_R = 1.0 / scale_R
    for k in range(residual_RC.shape[1]):
        code_R = (torch.round(residual_RC[:, k] * inverse_R) + zero_R).clamp(0, top)
        chosen_R = level_RL.gather(1, code_R.long()[:, None])[:, 0]
        error_R = weight_RC[:, k] - chosen_R
        code_RC[:, k] = code_R
        error_RC[:, k] = error_R
        residual_RC[:, k] -= chosen_R
        residual_RC[:, k + 1 :] += error_R[:, None] * upper_CC[k, k + 1 :]
    return Swept(code_RC, error_RC, residual_RC)


@numba.njit(nogil=True, cache=True)
@no_type_check
def _sweep(  # pragma: no cover - compiled
    target: np.ndarray,
    weight: np.ndarray,
    upper: np.ndarray,
    inverse: np.ndarray,
    zero: np.ndarray,
    level: np.ndarray,
    code: np.ndarray,
    error: np.ndarray,
) -> None:
    # Columns lie in rows here: each step is a run along the rows of the linear.
    columns, rows = target.shape
    top = level.shape[1] - 1
    chosen = np.empty(rows, dtype=np.uint32)
    for first in range(0, columns, TOGETHER):
        last = min(first + TOGETHER, columns)
        for k in range(first, last):
            nearest_codes(target[k], inverse, zero, top, chosen)
            for r in range(rows):
                code[k, r] = chosen[r]
                nearest = level[r, chosen[r]]
                error[k, r] = weight[k, r] - nearest
                target[k, r] -= nearest
            add_to_later(target[:last], error[k : k + 1], upper, k)
        add_to_later(target, error[first:last], upper, first)
