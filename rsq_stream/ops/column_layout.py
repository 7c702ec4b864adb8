"""Tiles that lie column by column, and what loops along their columns share.

On a CPU the solver goes through a tile of rows column by column, all rows at once, so
its matrices lie that way: a run of columns is one run of memory. On a GPU a warp takes
a row, and matrices lie row by row.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ROUND = np.float32(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds to even, for |x| < 2**22."""
TOGETHER = 16
"""Columns after which the later ones are brought up to date: their errors and the
targets of a column stay in the processor's first cache."""


def laid_out(matrix_RC: Tensor) -> Tensor:
    """Return the matrix as the loops of its device go through it, copied if need be."""
    return matrix_RC if matrix_RC.is_cuda else matrix_RC.T.contiguous().T


def empty(
    rows: int, columns: int, like: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return a matrix for the device of another, laid out for its loops."""
    if like.is_cuda:
        return torch.empty(rows, columns, dtype=dtype, device=like.device)
    return torch.empty(columns, rows, dtype=dtype).T


def product(
    left_RI: Float[Tensor, "R I"], right_IC: Float[Tensor, "I C"]
) -> Float[Tensor, "R C"]:
    """Multiply; the product is laid out for the loops."""
    made_RC = empty(len(left_RI), right_IC.shape[1], left_RI)
    return torch.mm(left_RI, right_IC, out=made_RC)


def plus_product(
    base_RC: Float[Tensor, "R C"],
    left_RI: Float[Tensor, "R I"],
    right_IC: Float[Tensor, "I C"],
    *,
    alpha: int = 1,
) -> Float[Tensor, "R C"]:
    """Compute base + alpha (left right), laid out for the loops."""
    made_RC = empty(len(base_RC), base_RC.shape[1], base_RC)
    return torch.addmm(base_RC, left_RI, right_IC, alpha=alpha, out=made_RC)


def by_columns(matrix_RC: Tensor) -> np.ndarray:
    """Copy a matrix to columns that lie in rows, for loops along the rows."""
    copied: np.ndarray = matrix_RC.T.clone(
        memory_format=torch.contiguous_format
    ).numpy()
    return copied


@numba.njit(nogil=True, cache=True)
@no_type_check
def add_to_later(  # pragma: no cover - compiled
    target: np.ndarray, error: np.ndarray, upper: np.ndarray, first: int
) -> None:
    """Add some columns' errors to the targets of all columns behind them.

    Columns lie in rows: ``target`` has all of a block, ``error`` those from ``first``
    on, few of them. Each target gains its errors in the order of columns.
    """
    columns, rows = target.shape
    few = error.shape[0]
    for j in range(first + few, columns):
        k = 0
        while k + 4 <= few:
            # Four at a time, in their order: a target is read and written once.
            a, b = upper[first + k, j], upper[first + k + 1, j]
            c, d = upper[first + k + 2, j], upper[first + k + 3, j]
            for r in range(rows):
                made = target[j, r] + error[k, r] * a
                made = made + error[k + 1, r] * b
                made = made + error[k + 2, r] * c
                target[j, r] = made + error[k + 3, r] * d
            k += 4
        while k < few:
            u = upper[first + k, j]
            for r in range(rows):
                target[j, r] += error[k, r] * u
            k += 1


@numba.njit(nogil=True, cache=True)
@no_type_check
def nearest_codes(  # pragma: no cover - compiled
    target: np.ndarray,
    inverse: np.ndarray,
    zero: np.ndarray,
    top: int,
    code: np.ndarray,
) -> None:
    """Round a column of targets to the integers of each row's grid."""
    for r in range(target.shape[0]):
        x = target[r] * inverse[r]
        # Clamped before rounding: the same, since the bounds are whole numbers.
        low, high = -zero[r], np.float32(top) - zero[r]
        x = x if x > low else low
        x = x if x < high else high
        # By way of int32, as unsigned, which needs no test for a negative index.
        code[r] = np.uint32(np.int32((x + ROUND) - ROUND + zero[r]))
