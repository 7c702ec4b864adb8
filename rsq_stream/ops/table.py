"""Sweep, descent and clip search for grids whose values are those of a table.

A code stands for scale times value[code], values ascending. The nearest one is found by
the midpoints between neighbours: the code of x is the number of midpoints below it. A
table has 2**bits values, so that takes ``bits`` comparisons.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from rsq_stream.ops.clip_search import best_scale_kernel
from rsq_stream.ops.column_layout import by_columns
from rsq_stream.ops.column_sweep import Swept, sweep_kernel
from rsq_stream.ops.descent import descend_kernel
from rsq_stream.ops.table_loops import (
    best_table_scales,
    descend_table_columns,
    sweep_table_columns,
)


def nearest_code(value: Tensor, middle_M: Float[Tensor, "M"]) -> Tensor:
    """Return the code nearest to each value, as whole numbers; on a tie the lower."""
    return torch.bucketize(value.contiguous(), middle_M)


def best_table_scale(
    target_RC: Float[Tensor, "R C"],
    scale_RP: Float[Tensor, "R P"],
    value_L: Float[Tensor, "L"],
    exponent: float,
    mirrored: bool,
) -> Int[Tensor, "R"]:
    """Return per row the best candidate's index p, or -1 - p for its mirror.

    The smallest sum of |error|^exponent wins, the earlier candidate on a tie, the
    upright table before the mirrored one. ``scale_RP`` is positive.
    """
    if target_RC.is_cuda:
        return best_scale_kernel(
            target_RC,
            scale_RP,
            torch.zeros_like(scale_RP[:, 0]),
            top=len(value_L) - 1,
            exponent=exponent,
            mirrored=mirrored,
            table=(value_L, middles(value_L)),
        )
    best_R = torch.empty(target_RC.shape[0], dtype=torch.int64)
    best_table_scales(
        target_RC.contiguous().numpy(),
        scale_RP.contiguous().numpy(),
        value_L.numpy(),
        middles(value_L).numpy(),
        np.float32(exponent),
        mirrored,
        best_R.numpy(),
    )
    return best_R


def best_table_scale_naive(
    target_RC: Float[Tensor, "R C"],
    scale_RP: Float[Tensor, "R P"],
    value_L: Float[Tensor, "L"],
    exponent: float,
    mirrored: bool,
) -> Int[Tensor, "R"]:
    """Do the same, candidate by candidate, on any device."""
    errors_PR = []
    middle_M = middles(value_L)
    for sign in (1, -1) if mirrored else (1,):
        for scale_R in scale_RP.T:
            scale_R1 = sign * scale_R[:, None]
            code_RC = nearest_code(target_RC * (1.0 / scale_R1), middle_M)
            error_RC = (target_RC - scale_R1 * value_L[code_RC]).abs()
            errors_PR.append(error_RC.pow(exponent).sum(dim=1))
    best_R = torch.stack(errors_PR).argmin(dim=0)
    candidates = scale_RP.shape[1]
    return torch.where(best_R < candidates, best_R, candidates - 1 - best_R)


def middles(value_L: Float[Tensor, "L"]) -> Float[Tensor, "M"]:
    """Return the midpoints between neighbouring values."""
    return (value_L[1:] + value_L[:-1]) / 2


def sweep_table(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    value_L: Float[Tensor, "L"],
    level_RL: Float[Tensor, "R L"],
) -> Swept:
    """Quantize a block of columns left to right, as ``ops/column_sweep.py`` does."""
    if target_RC.is_cuda:
        return sweep_kernel(
            target_RC,
            weight_RC,
            upper_CC,
            scale_R=scale_R,
            zero_R=torch.zeros_like(scale_R),
            level_RL=level_RL,
            middle_M=middles(value_L),
        )
    left_CR = by_columns(target_RC)
    code_CR = np.empty(left_CR.shape, dtype=np.uint8)
    error_CR = np.empty(left_CR.shape, dtype=np.float32)
    sweep_table_columns(
        left_CR,
        weight_RC.T.contiguous().numpy(),
        upper_CC.contiguous().numpy(),
        (1.0 / scale_R).numpy(),
        middles(value_L).numpy(),
        level_RL.contiguous().numpy(),
        code_CR,
        error_CR,
    )
    return Swept(*(torch.from_numpy(made).T for made in (code_CR, error_CR, left_CR)))


def sweep_table_naive(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    value_L: Float[Tensor, "L"],
    level_RL: Float[Tensor, "R L"],
) -> Swept:
    """Do the same column by column, all rows at once, on any device."""
    residual_RC = target_RC.clone()
    code_RC = torch.empty(
        residual_RC.shape, dtype=torch.uint8, device=residual_RC.device
    )
    error_RC = torch.empty_like(residual_RC)
    middle_M, inverse_R = middles(value_L), 1.0 / scale_R
    for k in range(residual_RC.shape[1]):
        code_R = nearest_code(residual_RC[:, k] * inverse_R, middle_M)
        chosen_R = level_RL.gather(1, code_R[:, None])[:, 0]
        error_R = weight_RC[:, k] - chosen_R
        code_RC[:, k] = code_R
        error_RC[:, k] = error_R
        residual_RC[:, k] -= chosen_R
        residual_RC[:, k + 1 :] += error_R[:, None] * upper_CC[k, k + 1 :]
    return Swept(code_RC, error_RC, residual_RC)


def descend_table(
    code_RC: UInt8[Tensor, "R C"],
    pull_RC: Float[Tensor, "R C"],
    hessian_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    value_L: Float[Tensor, "L"],
    level_RL: Float[Tensor, "R L"],
) -> UInt8[Tensor, "R C"]:
    """Compute better codes by coordinate descent, as ``ops/descent.py`` does."""
    if code_RC.is_cuda:
        return descend_kernel(
            code_RC,
            pull_RC,
            hessian_CC,
            scale_R=scale_R,
            zero_R=torch.zeros_like(scale_R),
            level_RL=level_RL,
            middle_M=middles(value_L),
        )
    code_CR = by_columns(code_RC)
    descend_table_columns(
        code_CR,
        by_columns(pull_RC),
        (-hessian_CC).contiguous().numpy(),
        (1.0 / scale_R).numpy(),
        middles(value_L).numpy(),
        level_RL.contiguous().numpy(),
    )
    return torch.from_numpy(code_CR).T


def descend_table_naive(
    code_RC: UInt8[Tensor, "R C"],
    pull_RC: Float[Tensor, "R C"],
    hessian_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    value_L: Float[Tensor, "L"],
    level_RL: Float[Tensor, "R L"],
) -> UInt8[Tensor, "R C"]:
    """Do the same column by column, all rows at once, on any device."""
    code_RC, pull_RC = code_RC.clone(), pull_RC.clone()
    middle_M, inverse_R = middles(value_L), 1.0 / scale_R
    for k in range(code_RC.shape[1]):
        before_R = level_RL.gather(1, code_RC[:, k].long()[:, None])[:, 0]
        target_R = before_R + pull_RC[:, k] / hessian_CC[k, k]
        code_R = nearest_code(target_R * inverse_R, middle_M)
        step_R = level_RL.gather(1, code_R[:, None])[:, 0] - before_R
        code_RC[:, k] = code_R
        pull_RC[:, k + 1 :] -= step_R[:, None] * hessian_CC[k, k + 1 :]
    return code_RC
