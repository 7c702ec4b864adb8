"""The loops of ``table.py``, compiled."""

from typing import no_type_check

import numba
import numpy as np

from rsq_stream.ops.column_layout import TOGETHER, add_to_later


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
def sweep_table_columns(  # pragma: no cover - compiled
    target: np.ndarray,
    weight: np.ndarray,
    upper: np.ndarray,
    inverse: np.ndarray,
    middle: np.ndarray,
    level: np.ndarray,
    code: np.ndarray,
    error: np.ndarray,
) -> None:
    """Quantize columns left to right; ``target`` keeps what is left of them."""
    columns, rows = target.shape
    for first in range(0, columns, TOGETHER):
        last = min(first + TOGETHER, columns)
        for k in range(first, last):
            for r in range(rows):
                q = _code_of(target[k, r] * inverse[r], middle)
                code[k, r] = q
                error[k, r] = weight[k, r] - level[r, q]
                target[k, r] -= level[r, q]
            add_to_later(target[:last], error[k : k + 1], upper, k)
        add_to_later(target, error[first:last], upper, first)


@numba.njit(nogil=True, cache=True)
@no_type_check
def descend_table_columns(  # pragma: no cover - compiled
    code: np.ndarray,
    pull: np.ndarray,
    minus: np.ndarray,
    inverse: np.ndarray,
    middle: np.ndarray,
    level: np.ndarray,
) -> None:
    """Move codes to the level nearest their minimiser, column by column.

    ``minus`` is -H among the columns; ``code`` and ``pull`` are overwritten.
    """
    columns, rows = code.shape
    step = np.empty((TOGETHER, rows), dtype=np.float32)
    for first in range(0, columns, TOGETHER):
        last = min(first + TOGETHER, columns)
        for k in range(first, last):
            share = np.float32(1.0) / -minus[k, k]
            own = step[k - first : k - first + 1]
            for r in range(rows):
                before = level[r, code[k, r]]
                q = _code_of((before + pull[k, r] * share) * inverse[r], middle)
                code[k, r] = q
                own[0, r] = level[r, q] - before
            add_to_later(pull[:last], own, minus, k)
        add_to_later(pull, step[: last - first], minus, first)


@numba.njit(nogil=True, cache=True)
@no_type_check
def best_table_scales(  # pragma: no cover - compiled
    target: np.ndarray,
    scale: np.ndarray,
    value: np.ndarray,
    middle: np.ndarray,
    exponent: np.float32,
    mirrored: bool,
    best: np.ndarray,
) -> None:
    """Find per row the best candidate, or its mirror."""
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
