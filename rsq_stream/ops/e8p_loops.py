"""The E8P loops, compiled: nearest codeword, sweep and descent over blocks of 8.

Nearest codeword of x: for both shifts d, the nearest vector h to u = x - d among the
256 patterns with their signs, by the largest 2 h u - |h|^2. Signs follow u; where that
makes the sum odd one must not, at best that of the smallest |u_i|, by exchange. All
patterns of norm up to 10 come in every order, so of each kind the best has its larger
entries at the larger |u_i|: 7 kinds, one sort. The 29 of norm 12 do not come in every
order; they are tried one by one, but only where five 3/2 at the best places could win.
"""

from typing import no_type_check

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
@no_type_check
def nearest_of_shift(  # pragma: no cover - compiled
    x: np.ndarray,
    shift: float,
    halves: np.ndarray,
    least: float,
    size: np.ndarray,
    order: np.ndarray,
    vector: np.ndarray,
) -> float:
    """Put into ``vector`` the nearest h + shift, if nearer than ``least``.

    ``least`` and what comes back are squared distances. ``size`` and ``order`` are
    room for 8 numbers.
    """
    whole = 0.0
    square = 0.0
    odd = 0
    for i in range(8):
        u = x[i] - shift
        if u < 0.0:
            odd ^= 1
            u = -u
        size[i] = u
        whole += u
        square += u * u
        # Descending; of equal sizes the earlier place comes first.
        at = i
        while at > 0 and size[order[at - 1]] < u:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i
    smallest = size[order[7]]
    # 2 h u - |h|^2 of k times 3/2, by the parity of k: with all signs or without one.
    even_sum = whole - (2.0 * smallest if odd else 0.0)
    odd_sum = whole - (0.0 if odd else 2.0 * smallest)
    best = even_sum - 2.0
    kind = 0
    top = 0.0
    for k in range(1, 5):
        top += size[order[k - 1]]
        score = (odd_sum if k & 1 else even_sum) + 2.0 * top - 2.0 * (k + 1)
        if score > best:
            best = score
            kind = k
    first, second = size[order[0]], size[order[1]]
    score = even_sum + 4.0 * first - 8.0
    if score > best:
        best = score
        kind = 5
    score = odd_sum + 4.0 * first + 2.0 * second - 10.0
    if score > best:
        best = score
        kind = 6
    number = -1
    flipped = order[7]
    top += size[order[4]]
    if odd_sum + 2.0 * top - 12.0 > best:
        for p in range(halves.shape[0]):
            a, b, c = halves[p, 0], halves[p, 1], halves[p, 2]
            score = 3.0 * whole - 2.0 * (size[a] + size[b] + size[c]) - 12.0
            if score <= best:
                continue
            at = order[7]
            if not odd:
                # One sign against u: where it costs least, 4 h_i |u_i|.
                cost = np.inf
                for i in range(8):
                    one = size[i] * (2.0 if i in (a, b, c) else 6.0)
                    if one < cost:
                        cost = one
                        at = i
                score -= cost
            if score > best:
                best = score
                number = p
                flipped = at
    distance = square - best
    if distance >= least:
        return least
    for i in range(8):
        vector[i] = 0.5
    against = odd == 1
    if number >= 0:
        for i in range(8):
            vector[i] = 1.5
        for i in range(3):
            vector[halves[number, i]] = 0.5
        against = odd == 0
    elif kind <= 4:
        for i in range(kind):
            vector[order[i]] = 1.5
        if kind & 1:
            against = odd == 0
    else:
        vector[order[0]] = 2.5
        if kind == 6:
            vector[order[1]] = 1.5
            against = odd == 0
    for i in range(8):
        minus = x[i] - shift < 0.0
        if against and i == flipped:
            minus = not minus
        vector[i] = (-vector[i] if minus else vector[i]) + shift
    return distance


@numba.njit(nogil=True, cache=True)
@no_type_check
def nearest(  # pragma: no cover - compiled
    x: np.ndarray,
    halves: np.ndarray,
    size: np.ndarray,
    order: np.ndarray,
    vector: np.ndarray,
) -> float:
    """Put the nearest codeword to ``x`` into ``vector``; gives the squared distance."""
    distance = nearest_of_shift(x, 0.25, halves, np.inf, size, order, vector)
    return nearest_of_shift(x, -0.25, halves, distance, size, order, vector)


@numba.njit(nogil=True, cache=True)
@no_type_check
def round_rows(  # pragma: no cover - compiled
    target: np.ndarray, inverse: np.ndarray, halves: np.ndarray, digit: np.ndarray
) -> None:
    """Return the digits of the codewords nearest to target / scale, row by row."""
    x, size, vector = np.empty(8), np.empty(8), np.empty(8)
    order = np.empty(8, dtype=np.int64)
    rows, columns = target.shape
    for r in range(rows):
        for b in range(0, columns, 8):
            for i in range(8):
                x[i] = target[r, b + i] * inverse[r]
            nearest(x, halves, size, order, vector)
            for i in range(8):
                digit[r, b + i] = int(2.0 * vector[i] + 5.5)


@numba.njit(nogil=True, cache=True)
@no_type_check
def row_errors(  # pragma: no cover - compiled
    target: np.ndarray, scale: np.ndarray, halves: np.ndarray, error: np.ndarray
) -> None:
    """Sum each row's squared errors of rounding, for each of its candidate scales."""
    x, size, vector = np.empty(8), np.empty(8), np.empty(8)
    order = np.empty(8, dtype=np.int64)
    rows, columns = target.shape
    for r in range(rows):
        for p in range(scale.shape[1]):
            inverse = 1.0 / scale[r, p]
            total = 0.0
            for b in range(0, columns, 8):
                for i in range(8):
                    x[i] = target[r, b + i] * inverse
                total += nearest(x, halves, size, order, vector)
            error[r, p] = total * scale[r, p] * scale[r, p]


@numba.njit(nogil=True, cache=True)
@no_type_check
def sweep_rows(  # pragma: no cover - compiled
    owed: np.ndarray,
    weight: np.ndarray,
    upper: np.ndarray,
    unit: np.ndarray,
    inverse: np.ndarray,
    level: np.ndarray,
    halves: np.ndarray,
    digit: np.ndarray,
    error: np.ndarray,
) -> None:
    """Quantize columns in blocks of 8; ``owed`` gains the errors of earlier columns.

    ``unit`` holds the inverses of ``upper``'s own 8 x 8 tiles.
    """
    x, size, vector = np.empty(8), np.empty(8), np.empty(8)
    order = np.empty(8, dtype=np.int64)
    rows, columns = owed.shape
    for r in range(rows):
        for b in range(0, columns, 8):
            for i in range(8):
                best = np.float32(0.0)
                for j in range(i + 1):
                    best += owed[r, b + j] * unit[b // 8, j, i]
                x[i] = (weight[r, b + i] + best) * inverse[r]
            nearest(x, halves, size, order, vector)
            for i in range(8):
                d = int(2.0 * vector[i] + 5.5)
                digit[r, b + i] = d
                e = weight[r, b + i] - level[r, d]
                error[r, b + i] = e
                for j in range(b + i + 1, columns):
                    owed[r, j] += e * upper[b + i, j]


@numba.njit(nogil=True, cache=True)
@no_type_check
def descend_rows(  # pragma: no cover - compiled
    digit: np.ndarray,
    pull: np.ndarray,
    hessian: np.ndarray,
    solved: np.ndarray,
    inverse: np.ndarray,
    level: np.ndarray,
    halves: np.ndarray,
) -> None:
    """Move blocks of 8 to the codeword nearest their minimiser, where the loss falls.

    ``solved`` holds the inverses of ``hessian``'s own 8 x 8 tiles; ``digit`` and
    ``pull`` are overwritten.
    """
    x, size, vector, step = np.empty(8), np.empty(8), np.empty(8), np.empty(8)
    order = np.empty(8, dtype=np.int64)
    rows, columns = digit.shape
    for r in range(rows):
        for b in range(0, columns, 8):
            for i in range(8):
                best = np.float32(0.0)
                for j in range(8):
                    best += pull[r, b + j] * solved[b // 8, j, i]
                x[i] = (level[r, digit[r, b + i]] + best) * inverse[r]
            nearest(x, halves, size, order, vector)
            gain = 0.0
            for i in range(8):
                d = int(2.0 * vector[i] + 5.5)
                step[i] = level[r, d] - level[r, digit[r, b + i]]
            for i in range(8):
                bent = 0.0
                for j in range(8):
                    bent += step[j] * hessian[b + j, b + i]
                gain += step[i] * (2.0 * pull[r, b + i] - bent)
            if gain <= 0.0:
                continue
            for i in range(8):
                digit[r, b + i] = int(2.0 * vector[i] + 5.5)
                s = np.float32(step[i])
                for j in range(b + 8, columns):
                    pull[r, j] -= s * hessian[b + i, j]
