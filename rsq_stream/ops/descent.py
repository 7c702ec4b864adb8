"""Coordinate descent over the codes of a block of columns, left to right.

With e = w - level[code] and P = e H, code k of a row moves to the level nearest to
its minimiser, level[code_k] + P_k / H[k, k]; then P_j falls by the step times H[k, j].
No move raises the loss e H e^T. Rows are independent.
"""

from typing import no_type_check

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


def descend(
    code_RC: UInt8[Tensor, "R C"],
    pull_RC: Float[Tensor, "R C"],
    hessian_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> UInt8[Tensor, "R C"]:
    """Compute better codes for columns that share one scale per row.

    ``pull_RC`` is P = e H at these columns; ``level_RL`` what each code decodes to.
    """
    if code_RC.is_cuda:
        return descend_kernel(
            code_RC,
            pull_RC,
            hessian_CC,
            scale_R=scale_R,
            zero_R=zero_R,
            level_RL=level_RL,
        )
    code_CR = by_columns(code_RC)
    _descend(
        code_CR,
        by_columns(pull_RC),
        (-hessian_CC).contiguous().numpy(),
        (1.0 / scale_R).numpy(),
        zero_R.contiguous().numpy(),
        level_RL.contiguous().numpy(),
    )
    return torch.from_numpy(code_CR).T


def descend_kernel(
    code_RC: UInt8[Tensor, "R C"],
    pull_RC: Float[Tensor, "R C"],
    hessian_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
    middle_M: Float[Tensor, "M"] | None = None,
) -> UInt8[Tensor, "R C"]:
    """Do the same with ``kernels/descent.cu``; at most 256 columns.

    With the midpoints of a table, codes are by it (``table.py``).
    """
    rows, columns = code_RC.shape
    code_RC, pull_RC, hessian_CC = map(by_rows, (code_RC, pull_RC, hessian_CC))
    chunks = chunks_of("descent", "columns", columns)
    better_RC = output((rows, columns), torch.uint8, code_RC.device)
    launch(
        Kernel("descent", "descent", (*chunks, *tabled(middle_M))),
        (-(-rows // ROWS_PER_BLOCK), 1, 1),
        ROWS_PER_BLOCK * WARP,
        (
            *(code_RC, code_RC.stride(0)),
            *(pull_RC, pull_RC.stride(0)),
            *(hessian_CC, hessian_CC.stride(0)),
            *(scale_R.contiguous(), zero_R.contiguous(), level_RL.contiguous()),
            0 if middle_M is None else middle_M.contiguous(),
            *(better_RC, rows, columns, level_RL.shape[1]),
        ),
    )
    return better_RC


def descend_naive(
    code_RC: UInt8[Tensor, "R C"],
    pull_RC: Float[Tensor, "R C"],
    hessian_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> UInt8[Tensor, "R C"]:
    """Do the same column by column, all rows at once, on any device."""
    code_RC, pull_RC = code_RC.clone(), pull_RC.clone()
    top = level_RL.shape[1] - 1
    inverse_R = 1.0 / scale_R
    for k in range(code_RC.shape[1]):
        before_R = level_RL.gather(1, code_RC[:, k].long()[:, None])[:, 0]
        target_R = before_R + pull_RC[:, k] / hessian_CC[k, k]
        code_R = (torch.round(target_R * inverse_R) + zero_R).clamp(0, top)
        step_R = level_RL.gather(1, code_R.long()[:, None])[:, 0] - before_R
        code_RC[:, k] = code_R
        pull_RC[:, k + 1 :] -= step_R[:, None] * hessian_CC[k, k + 1 :]
    return code_RC


@numba.njit(nogil=True, cache=True)
@no_type_check
def _descend(  # pragma: no cover - compiled
    code: np.ndarray,
    pull: np.ndarray,
    minus: np.ndarray,
    inverse: np.ndarray,
    zero: np.ndarray,
    level: np.ndarray,
) -> None:
    # Columns lie in rows here: each step is a run along the rows of the linear.
    columns, rows = code.shape
    top = level.shape[1] - 1
    before = np.empty(rows, dtype=np.float32)
    target = np.empty(rows, dtype=np.float32)
    chosen = np.empty(rows, dtype=np.uint32)
    step = np.empty((TOGETHER, rows), dtype=np.float32)
    for first in range(0, columns, TOGETHER):
        last = min(first + TOGETHER, columns)
        for k in range(first, last):
            share = np.float32(1.0) / -minus[k, k]
            for r in range(rows):
                before[r] = level[r, code[k, r]]
                target[r] = before[r] + pull[k, r] * share
            nearest_codes(target, inverse, zero, top, chosen)
            own = step[k - first : k - first + 1]
            for r in range(rows):
                code[k, r] = chosen[r]
                own[0, r] = level[r, chosen[r]] - before[r]
            add_to_later(pull[:last], own, minus, k)
        add_to_later(pull, step[: last - first], minus, first)
