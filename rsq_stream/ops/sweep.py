"""The sequential heart of the solver: quantize one block of columns, left to right.

For each row: code_k = clamp(round(target_k / s) + z), e_k = w_k - level[code_k],
and every later target of the block gains e_k U[k, j]. Rows are independent.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_ROUND = np.float32(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds to even, for |x| < 2**22."""


def sweep(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> tuple[UInt8[Tensor, "R C"], Float[Tensor, "R C"]]:
    """Quantize a block of columns that share one scale per row.

    Parameters
    ----------
    target_RC
        Weights plus the errors of all earlier blocks; overwritten.
    weight_RC
        The weights themselves.
    upper_CC
        U of these columns; only what is above the diagonal is read.
    scale_R, zero_R
        Scale (its sign included) and zero point of each row.
    level_RL
        What each code decodes to, rounded as it will be when loaded.

    Returns
    -------
    The codes and the errors ``weight - level[code]``.
    """
    if target_RC.is_cuda:
        return sweep_naive(target_RC, weight_RC, upper_CC, scale_R, zero_R, level_RL)
    code_RC = np.empty(target_RC.shape, dtype=np.uint8)
    error_RC = np.empty(target_RC.shape, dtype=np.float32)
    _sweep(
        np.ascontiguousarray(target_RC.numpy()),
        np.ascontiguousarray(weight_RC.numpy()),
        np.ascontiguousarray(upper_CC.numpy()),
        (1.0 / scale_R).numpy(),
        zero_R.numpy(),
        np.ascontiguousarray(level_RL.numpy()),
        code_RC,
        error_RC,
    )
    return torch.from_numpy(code_RC), torch.from_numpy(error_RC)


def sweep_naive(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    zero_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> tuple[UInt8[Tensor, "R C"], Float[Tensor, "R C"]]:
    """Do the same column by column, all rows at once, on any device."""
    target_RC = target_RC.clone()
    code_RC = torch.empty(target_RC.shape, dtype=torch.uint8, device=target_RC.device)
    error_RC = torch.empty_like(target_RC)
    top = level_RL.shape[1] - 1
    inverse_R = 1.0 / scale_R
    for k in range(target_RC.shape[1]):
        code_R = (torch.round(target_RC[:, k] * inverse_R) + zero_R).clamp(0, top)
        chosen_R = level_RL.gather(1, code_R.long()[:, None])[:, 0]
        error_R = weight_RC[:, k] - chosen_R
        code_RC[:, k] = code_R
        error_RC[:, k] = error_R
        target_RC[:, k + 1 :] += error_R[:, None] * upper_CC[k, k + 1 :]
    return code_RC, error_RC


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
    rows, columns = target.shape
    top = np.float32(level.shape[1] - 1)
    limit = np.float32(1024.0)
    for r in range(rows):
        for k in range(columns):
            x = min(max(target[r, k] * inverse[r], -limit), limit)
            x = (x + _ROUND) - _ROUND + zero[r]
            q = int(min(max(x, np.float32(0.0)), top))
            e = weight[r, k] - level[r, q]
            code[r, k] = q
            error[r, k] = e
            for j in range(k + 1, columns):
                target[r, j] += e * upper[k, j]
