"""Sweep, descent and clip search for grids whose values are those of a table.

A code stands for scale times value[code], values ascending. The nearest one is found by
the midpoints between neighbours: the code of x is the number of midpoints below it. A
table has 2**bits values, so that takes ``bits`` comparisons.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


def nearest_code(value: Tensor, middle_M: Float[Tensor, "M"]) -> Tensor:
    """Give the code nearest to each value, as whole numbers; on a tie the lower."""
    return torch.bucketize(value, middle_M)


def best_table_scale(
    target_RC: Float[Tensor, "R C"],
    scale_RP: Float[Tensor, "R P"],
    value_L: Float[Tensor, "L"],
    exponent: float,
    mirrored: bool,
) -> Int[Tensor, "R"]:
    """Give per row the best candidate's index p, or -1 - p for its mirror.

    The smallest sum of |error|^exponent wins, the earlier candidate on a tie, the
    upright table before the mirrored one. ``scale_RP`` is positive.
    """
    if target_RC.is_cuda:
        return best_table_scale_naive(target_RC, scale_RP, value_L, exponent, mirrored)
    best_R = torch.empty(target_RC.shape[0], dtype=torch.int64)
    _best_scale(
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
    """Give the midpoints between neighbouring values."""
    return (value_L[1:] + value_L[:-1]) / 2


def sweep_table(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    value_L: Float[Tensor, "L"],
    level_RL: Float[Tensor, "R L"],
) -> tuple[UInt8[Tensor, "R C"], Float[Tensor, "R C"]]:
    """Quantize a block of columns left to right, as ``ops/sweep.py`` does."""
    if target_RC.is_cuda:
        return sweep_table_naive(
            target_RC, weight_RC, upper_CC, scale_R, value_L, level_RL
        )
    target_CR = target_RC.T.contiguous().numpy().copy()
    code_CR = np.empty(target_CR.shape, dtype=np.uint8)
    error_CR = np.empty(target_CR.shape, dtype=np.float32)
    _sweep(
        target_CR,
        weight_RC.T.contiguous().numpy(),
        upper_CC.contiguous().numpy(),
        (1.0 / scale_R).numpy(),
        middles(value_L).numpy(),
        level_RL.contiguous().numpy(),
        code_CR,
        error_CR,
    )
    return torch.from_numpy(code_CR).T, torch.from_numpy(error_CR).T


def sweep_table_naive(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    value_L: Float[Tensor, "L"],
    level_RL: Float[Tensor, "R L"],
) -> tuple[UInt8[Tensor, "R C"], Float[Tensor, "R C"]]:
    """Do the same column by column, all rows at once, on any device."""
    target_RC = target_RC.clone()
    code_RC = torch.empty(target_RC.shape, dtype=torch.uint8, device=target_RC.device)
    error_RC = torch.empty_like(target_RC)
    middle_M, inverse_R = middles(value_L), 1.0 / scale_R
    for k in range(target_RC.shape[1]):
        code_R = nearest_code(target_RC[:, k] * inverse_R, middle_M)
        error_R = weight_RC[:, k] - level_RL.gather(1, code_R[:, None])[:, 0]
        code_RC[:, k] = code_R
        error_RC[:, k] = error_R
        target_RC[:, k + 1 :] += error_R[:, None] * upper_CC[k, k + 1 :]
    return code_RC, error_RC


def descend_table(
    code_RC: UInt8[Tensor, "R C"],
    pull_RC: Float[Tensor, "R C"],
    hessian_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    value_L: Float[Tensor, "L"],
    level_RL: Float[Tensor, "R L"],
) -> UInt8[Tensor, "R C"]:
    """Give better codes by coordinate descent, as ``ops/descent.py`` does."""
    if code_RC.is_cuda:
        return descend_table_naive(
            code_RC, pull_RC, hessian_CC, scale_R, value_L, level_RL
        )
    code_CR = code_RC.T.contiguous().numpy().copy()
    _descend(
        code_CR,
        pull_RC.T.contiguous().numpy().copy(),
        hessian_CC.contiguous().numpy(),
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


@numba.njit(nogil=True, cache=True)
@no_type_check
def _code_of(  # pragma: no cover - compiled
    x: np.float32, middle: np.ndarray
) -> int:
    # There are 2**bits - 1 midpoints: halve what is left until one code is.
    code = 0
    step = (middle.shape[0] + 1) >> 1
    while step > 0:
        if x > middle[code + step - 1]:
            code += step
        step >>= 1
    return code


@numba.njit(nogil=True, cache=True)
@no_type_check
def _sweep(  # pragma: no cover - compiled
    target: np.ndarray,
    weight: np.ndarray,
    upper: np.ndarray,
    inverse: np.ndarray,
    middle: np.ndarray,
    level: np.ndarray,
    code: np.ndarray,
    error: np.ndarray,
) -> None:
    # Columns lie in rows here: each step is a run along the rows of the linear.
    columns, rows = target.shape
    for k in range(columns):
        for r in range(rows):
            q = _code_of(target[k, r] * inverse[r], middle)
            code[k, r] = q
            error[k, r] = weight[k, r] - level[r, q]
        for j in range(k + 1, columns):
            u = upper[k, j]
            for r in range(rows):
                target[j, r] += error[k, r] * u


@numba.njit(nogil=True, cache=True)
@no_type_check
def _descend(  # pragma: no cover - compiled
    code: np.ndarray,
    pull: np.ndarray,
    hessian: np.ndarray,
    inverse: np.ndarray,
    middle: np.ndarray,
    level: np.ndarray,
) -> None:
    columns, rows = code.shape
    step = np.empty(rows, dtype=np.float32)
    for k in range(columns):
        weight = np.float32(1.0) / hessian[k, k]
        for r in range(rows):
            before = level[r, code[k, r]]
            q = _code_of((before + pull[k, r] * weight) * inverse[r], middle)
            code[k, r] = q
            step[r] = level[r, q] - before
        for j in range(k + 1, columns):
            h = hessian[k, j]
            for r in range(rows):
                pull[j, r] -= step[r] * h


@numba.njit(nogil=True, cache=True)
@no_type_check
def _best_scale(  # pragma: no cover - compiled
    target: np.ndarray,
    scale: np.ndarray,
    value: np.ndarray,
    middle: np.ndarray,
    exponent: np.float32,
    mirrored: bool,
    best: np.ndarray,
) -> None:
    candidates = scale.shape[1]
    signed = np.empty(candidates, dtype=np.float32)
    inverse = np.empty(candidates, dtype=np.float32)
    x = np.empty(candidates, dtype=np.float32)
    nearest = np.empty(candidates, dtype=np.float32)
    total = np.empty(candidates, dtype=np.float32)
    half = np.float32(0.5) * exponent
    squared = exponent == np.float32(2.0)
    # Up to 4 bits a chain of choices is quicker than a search: it takes vectors.
    chained = middle.shape[0] <= 15
    for r in range(target.shape[0]):
        least = np.float32(np.inf)
        choice = 0
        for turn in range(2 if mirrored else 1):
            for p in range(candidates):
                signed[p] = scale[r, p] if turn == 0 else -scale[r, p]
                inverse[p] = np.float32(1.0) / signed[p]
                total[p] = np.float32(0.0)
            for c in range(target.shape[1]):
                t = target[r, c]
                for p in range(candidates):
                    x[p] = t * inverse[p]
                    nearest[p] = value[0]
                if chained:
                    for m in range(middle.shape[0]):
                        bound, above = middle[m], value[m + 1]
                        for p in range(candidates):
                            nearest[p] = above if x[p] > bound else nearest[p]
                else:
                    for p in range(candidates):
                        nearest[p] = value[_code_of(x[p], middle)]
                if squared:
                    for p in range(candidates):
                        e = t - signed[p] * nearest[p]
                        total[p] += e * e
                else:
                    for p in range(candidates):
                        e = t - signed[p] * nearest[p]
                        total[p] += (e * e) ** half
            for p in range(candidates):
                if total[p] < least:
                    least = total[p]
                    choice = p if turn == 0 else -1 - p
        best[r] = choice
