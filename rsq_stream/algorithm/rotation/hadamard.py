"""Hadamard matrices, built rather than tabled, and their fast product.

A Hadamard matrix of order n has entries +-1 and H H^T = n I. Sylvester doubles
an order; Paley (1933) gives order q + 1 for a prime q = 3 mod 4, and 2 (q + 1)
for a prime q = 1 mod 4, from the quadratic residues of q.
"""

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.ops.hadamard import fits, hadamard_kernel, package_product

_LARGEST_PALEY = 1024
"""Widest Paley factor: it is applied dense, and above this a fallback is cheaper."""
_DENSE = 64
"""Widest factor applied as one dense product; wider powers of two are split."""


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


@functools.cache
def paley(order: int) -> Tensor | None:
    """Return a Hadamard matrix of this order by Paley's constructions, or None.

    Returns an int8 matrix ``[order, order]``. ``paley(12)`` exists (11 is a prime
    of the form 4 k + 3), ``paley(28)`` too (13 is one of the form 4 k + 1).
    """
    if order % 4:
        return None
    q = order - 1
    if _is_prime(q) and q % 4 == 3:
        core = _jacobsthal(q)
        matrix = torch.ones(order, order, dtype=torch.int8)
        matrix[1:, 0] = -1
        matrix[1:, 1:] = core + torch.eye(q, dtype=torch.int8)
        return matrix
    q = order // 2 - 1
    if _is_prime(q) and q % 4 == 1:
        conference = torch.ones(q + 1, q + 1, dtype=torch.int8)
        conference[0, 0] = 0
        conference[1:, 1:] = _jacobsthal(q)
        plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
        zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
        eye = torch.eye(q + 1, dtype=torch.int8)
        return torch.kron(conference, plus) + torch.kron(eye, zero)
    return None


def _jacobsthal(q: int) -> Tensor:
    """Matrix of the quadratic character: entry (i, j) is chi(i - j) mod q."""
    character = torch.full((q,), -1, dtype=torch.int8)
    character[0] = 0
    character[torch.arange(1, q) ** 2 % q] = 1
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


@functools.cache
def factors_of(order: int) -> tuple[int, int] | None:
    """Split an order into (m, 2**k) with a Paley factor m, or 1; None if none fits.

    The smallest usable m is taken: ``factors_of(96) == (12, 8)``,
    ``factors_of(4096) == (1, 4096)``, ``factors_of(172) is None``.
    """
    power = order & -order
    odd = order // power
    if odd == 1:
        return 1, order
    m = odd
    while m <= min(order, _LARGEST_PALEY):
        if paley(m) is not None:
            return m, order // m
        m *= 2
    return None


def largest_factor(order: int) -> int:
    """Return the largest divisor of ``order`` that is itself a Hadamard order.

    ``largest_factor(172) == 4``; ``largest_factor(160) == 160``.
    """
    return max(d for d in _divisors(order) if factors_of(d) is not None)


def _divisors(order: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(order) + 1) if order % d == 0]
    return sorted({*small, *(order // d for d in small)})


@functools.cache
def sylvester(order: int) -> Tensor:
    """Return the Sylvester-Hadamard matrix of a power of two, int8 ``[n, n]``."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    step = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while matrix.shape[0] < order:
        matrix = torch.kron(step, matrix)
    return matrix


def kronecker_factors(order: int) -> list[Tensor]:
    """Return small matrices whose Kronecker product is a Hadamard matrix."""
    split = factors_of(order)
    if split is None:
        raise ValueError(f"no Hadamard matrix of order {order} can be built here")
    m, power = split
    found = [] if m == 1 else [paley(m)]
    while power > 1:
        width = min(power, _DENSE)
        found.append(sylvester(width))
        power //= width
    return [factor for factor in found if factor is not None]


def hadamard_product(x_LN: Float[Tensor, "L N"], order: int) -> Float[Tensor, "L N"]:
    """Compute ``x @ (I kron H) / sqrt(order)``, H the Hadamard matrix of ``order``.

    ``order`` divides N; each run of ``order`` columns is transformed by itself.
    The product is exact to the arithmetic of x's type. Plain products with the
    Kronecker factors of H: n sum(factors) steps in place of n**2.
    """
    rows, width = x_LN.shape
    fast = package_product(x_LN.reshape(-1, order))
    if fast is not None:
        return fast.reshape(rows, width)
    m, power = factors_of(order) or (order, 1)
    if fits(x_LN, m, power):
        dense = paley(m) if m > 1 else sylvester(1)
        if dense is not None:
            return hadamard_kernel(x_LN, dense, power)
    after = order
    result = x_LN.reshape(-1, 1, order)
    for factor in kronecker_factors(order):
        size = factor.shape[0]
        after //= size
        dense = factor.to(x_LN)
        result = result.reshape(-1, size, after)
        result = dense.T @ result if after > 1 else (result.squeeze(-1) @ dense)
    return result.reshape(rows, width) * (1.0 / math.sqrt(order))
