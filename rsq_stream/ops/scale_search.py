"""The whole search of integer grids' scales in one loop, row by row.

``Grid.search_naive`` is its twin: range, candidates rounded to the stored type, errors
(``clip_search.py``), choice. Between its many small steps threads wait for each other.
"""

from typing import NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.ops.clip_search import choose

_DROPPED = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Bits that a type's mantissa is shorter than that of fp32."""


class Searched(NamedTuple):
    """What the search goes by: a grid's fields, and the shares of the full range."""

    shares_P: Float[Tensor, "P"]
    bits: int
    symmetric: bool
    mirrored: bool
    exponent: float
    storage_type: torch.dtype


def search_scales(
    target_RC: Float[Tensor, "R C"], by: Searched
) -> tuple[Float[Tensor, "R"], Float[Tensor, "R"]]:
    """Return scale (negative: mirrored) and zero point per row, of targets on a CPU."""
    rows, top = target_RC.shape[0], (1 << by.bits) - 1
    info = torch.finfo(by.storage_type)
    made_2R = np.empty((2, rows), dtype=np.float32)
    _search(
        target_RC.T.contiguous().numpy(),
        by.shares_P.numpy(),
        np.int64(by.bits),
        by.symmetric,
        by.mirrored,
        np.float32(by.exponent),
        np.uint32(_DROPPED[by.storage_type]),
        np.float32(info.max / (top + 1)),
        np.float32(info.tiny),
        made_2R,
    )
    scale_R, zero_R = torch.from_numpy(made_2R)
    return scale_R, zero_R


@numba.njit(nogil=True, cache=True)
@no_type_check
def _search(  # pragma: no cover - compiled
    target: np.ndarray,
    shares: np.ndarray,
    bits: int,
    symmetric: bool,
    mirrored: bool,
    exponent: np.float32,
    dropped: np.uint32,
    largest: np.float32,
    tiny: np.float32,
    made: np.ndarray,
) -> None:
    # Columns lie in rows here: each step of the first loop is a run along the rows.
    columns, rows = target.shape
    low, high = target[0].copy(), target[0].copy()
    for c in range(1, columns):
        for r in range(rows):
            x = target[c, r]
            low[r] = x if x < low[r] else low[r]
            high[r] = x if x > high[r] else high[r]
    top = np.float32((1 << bits) - 1)
    scale = np.empty(shares.shape[0], dtype=np.float32)
    row = np.empty(columns, dtype=np.float32)
    for r in range(rows):
        if symmetric:
            full = max(-low[r], high[r]) / np.float32((1 << (bits - 1)) - 1)
            zero = np.float32(1 << (bits - 1))
        else:
            least, most = min(low[r], np.float32(0.0)), max(high[r], np.float32(0.0))
            full = (most - least) / top
            safe = full if full > 0.0 else np.float32(1.0)
            zero = min(max(np.rint(-least / safe), np.float32(0.0)), top)
        for p in range(shares.shape[0]):
            scale[p] = min(full * shares[p], largest)
        _round_to_stored(scale, dropped, tiny)
        choice = 0
        if mirrored or shares.shape[0] > 1:
            for c in range(columns):
                row[c] = target[c, r]
            choice = choose(row, scale, zero, top, exponent, mirrored)
        made[0, r] = scale[choice] if choice >= 0 else -scale[-1 - choice]
        made[1, r] = zero


@numba.njit(nogil=True, cache=True)
@no_type_check
def _round_to_stored(  # pragma: no cover - compiled
    scale: np.ndarray, dropped: np.uint32, tiny: np.float32
) -> None:
    """Round sizes to even in a shorter mantissa; what would be 0 is mended.

    What the type has no normal number for is less than ``tiny``, and becomes it.
    """
    pattern = scale.view(np.uint32)
    for p in range(scale.shape[0]):
        wanted = scale[p] > 0.0
        if dropped > 0:
            odd = (pattern[p] >> dropped) & np.uint32(1)
            half = (np.uint32(1) << (dropped - np.uint32(1))) - np.uint32(1)
            pattern[p] = ((pattern[p] + half + odd) >> dropped) << dropped
        scale[p] = max(scale[p], tiny) if wanted else np.float32(1.0)
