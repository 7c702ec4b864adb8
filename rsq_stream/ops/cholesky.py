"""Factor one small tile: A = R R^T with R upper triangular.

The tile is the serial heart of the blocked factorisation. One thread, fixed
order, so the result depends on nothing but the tile.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def factor_tile(tile_CC: Float[Tensor, "C C"]) -> Int[Tensor, ""]:
    """Overwrite the upper triangle of a symmetric tile by R, ``A = R R^T``.

    Only the upper triangle is read. Gives -1, or the index of the first pivot
    (from the last row upward) that is not positive; the tile is then spoiled. The
    answer stays where the tile is: whoever looks at it on a GPU waits for it.
    """
    if tile_CC.is_cuda:
        return factor_tile_naive(tile_CC)
    dense = np.ascontiguousarray(tile_CC.numpy())
    failed = int(_factor_tile(dense))
    tile_CC.copy_(torch.from_numpy(dense))
    return torch.tensor(failed)


def factor_tile_naive(tile_CC: Float[Tensor, "C C"]) -> Int[Tensor, ""]:
    """Do the same by the library's Cholesky, of the tile turned end to end."""
    symmetric_CC = tile_CC.triu() + tile_CC.triu(1).T
    lower_CC, info = torch.linalg.cholesky_ex(symmetric_CC.flip(0, 1))
    keep_CC = tile_CC.tril(-1)
    tile_CC.copy_(lower_CC.flip(0, 1) + keep_CC)
    return torch.where(info > 0, tile_CC.shape[0] - info, -1)


@numba.njit(nogil=True, cache=True)
@no_type_check
def _factor_tile(tile: np.ndarray) -> int:  # pragma: no cover - compiled
    size = tile.shape[0]
    for k in range(size - 1, -1, -1):
        pivot = tile[k, k]
        if not pivot > 0.0:
            return k
        root = np.sqrt(pivot)
        tile[k, k] = root
        for i in range(k):
            tile[i, k] /= root
        for i in range(k):
            # Row i, columns i..k-1: the inner loop runs along memory.
            left = tile[i, k]
            for j in range(i, k):
                tile[i, j] -= left * tile[j, k]
    return -1
