"""Find, row by row, which candidate scale rounds a run of weights best.

error(p) = sum over c of |t_c - s_p (clamp(round(t_c / s_p) + z, 0, top) - z)|^e,
and, where the grid may be mirrored, the same for -s_p. The smallest error wins,
the earlier candidate on a tie, the upright grid before the mirrored one.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsq_stream.ops.column_layout import ROUND
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


def best_scale(
    target_RC: Float[Tensor, "R C"],
    scale_RP: Float[Tensor, "R P"],
    zero_R: Float[Tensor, "R"],
    top: int,
    exponent: float,
    mirrored: bool,
) -> Int[Tensor, "R"]:
    """Return per row the best candidate's index p, or -1 - p for its mirror.

    ``scale_RP`` is positive; ``zero_R`` holds whole numbers from 0 to ``top``.
    """
    if scale_RP.shape[1] == 1 and not mirrored:  # nothing to choose from
        return torch.zeros(len(scale_RP), dtype=torch.int64, device=scale_RP.device)
    if target_RC.is_cuda:
        return best_scale_kernel(
            target_RC,
            scale_RP,
            zero_R,
            top=top,
            exponent=exponent,
            mirrored=mirrored,
        )
    best_R = np.empty(target_RC.shape[0], dtype=np.int64)
    _best_scale(
        np.ascontiguousarray(target_RC.numpy()),
        np.ascontiguousarray(scale_RP.numpy()),
        zero_R.numpy(),
        np.float32(top),
        np.float32(exponent),
        mirrored,
        best_R,
    )
    return torch.from_numpy(best_R)


def best_scale_kernel(
    target_RC: Float[Tensor, "R C"],
    scale_RP: Float[Tensor, "R P"],
    zero_R: Float[Tensor, "R"],
    top: int,
    exponent: float,
    mirrored: bool,
    table: tuple[Float[Tensor, "L"], Float[Tensor, "M"]] | None = None,
) -> Int[Tensor, "R"]:
    """Do the same with ``kernels/clip_search.cu``; at most 256 candidates.

    With a table's values and their midpoints, levels are those (``table.py``).
    """
    rows, columns = target_RC.shape
    candidates = scale_RP.shape[1]
    target_RC = by_rows(target_RC)
    best_R = output((rows,), torch.int64, target_RC.device)
    defines = chunks_of("clip search", "candidates", candidates)
    launch(
        Kernel("clip_search", "clip_search", (*defines, *tabled(table))),
        (-(-rows // ROWS_PER_BLOCK), 1, 1),
        ROWS_PER_BLOCK * WARP,
        (
            *(target_RC, target_RC.stride(0)),
            *(scale_RP.contiguous(), zero_R.contiguous()),
            *((0, 0) if table is None else (part.contiguous() for part in table)),
            best_R,
            *(rows, columns, candidates, top, float(exponent), int(mirrored)),
        ),
    )
    return best_R


def best_scale_naive(
    target_RC: Float[Tensor, "R C"],
    scale_RP: Float[Tensor, "R P"],
    zero_R: Float[Tensor, "R"],
    top: int,
    exponent: float,
    mirrored: bool,
) -> Int[Tensor, "R"]:
    """Do the same, candidate by candidate, on any device and in any float type."""
    errors_PR = []
    zero_R1 = zero_R[:, None]
    for sign in (1, -1) if mirrored else (1,):
        for scale_R in scale_RP.T:
            scale_R1 = sign * scale_R[:, None]
            code_RC = (torch.round(target_RC / scale_R1) + zero_R1).clamp(0, top)
            error_RC = (target_RC - scale_R1 * (code_RC - zero_R1)).abs()
            errors_PR.append(error_RC.pow(exponent).sum(dim=1))
    best_R = torch.stack(errors_PR).argmin(dim=0)
    candidates = scale_RP.shape[1]
    return torch.where(best_R < candidates, best_R, candidates - 1 - best_R)


@numba.njit(nogil=True, cache=True)
@no_type_check
def _best_scale(  # pragma: no cover - compiled
    target: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    top: np.float32,
    exponent: np.float32,
    mirrored: bool,
    best: np.ndarray,
) -> None:
    for r in range(target.shape[0]):
        best[r] = choose(target[r], scale[r], zero[r], top, exponent, mirrored)


@numba.njit(nogil=True, cache=True)
@no_type_check
def choose(  # pragma: no cover - compiled
    target: np.ndarray,
    scale: np.ndarray,
    zero: np.float32,
    top: np.float32,
    exponent: np.float32,
    mirrored: bool,
) -> int:
    """Return a row's best candidate, or -1 - p for the mirror of candidate p."""
    candidates = scale.shape[0]
    total = np.empty(candidates, dtype=np.float32)
    inverse = np.float32(1.0) / scale
    low = -zero
    high = top - zero
    _add_errors(target, scale, inverse, low, high, exponent, total)
    choice = 0
    for p in range(1, candidates):
        if total[p] < total[choice]:
            choice = p
    least = total[choice]
    if mirrored:
        _add_errors(target, scale, inverse, -high, -low, exponent, total)
        for p in range(candidates):
            if total[p] < least:
                least = total[p]
                choice = -1 - p
    return choice


@numba.njit(nogil=True, cache=True)
@no_type_check
def _add_errors(  # pragma: no cover - compiled
    target: np.ndarray,
    scale: np.ndarray,
    inverse: np.ndarray,
    low: np.float32,
    high: np.float32,
    exponent: np.float32,
    total: np.ndarray,
) -> None:
    """Sum a row's errors for each candidate; codes run from ``low`` to ``high``."""
    total[:] = np.float32(0.0)
    squared = exponent == np.float32(2.0)
    half = np.float32(0.5) * exponent
    for c in range(target.shape[0]):
        t = target[c]
        # Along the candidates and without branches, so that vectors can be used;
        # clamping before rounding is the same, since the bounds are whole numbers.
        if squared:
            for p in range(total.shape[0]):
                x = t * inverse[p]
                x = x if x > low else low
                x = x if x < high else high
                e = t - scale[p] * ((x + ROUND) - ROUND)
                total[p] += e * e
        else:
            for p in range(total.shape[0]):
                x = t * inverse[p]
                x = x if x > low else low
                x = x if x < high else high
                e = t - scale[p] * ((x + ROUND) - ROUND)
                total[p] += (e * e) ** half
