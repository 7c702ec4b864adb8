"""Hadamard matrices are exact, and their fast product keeps to an error budget."""

import math
from functools import reduce

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.rotation.hadamard import (
    factors_of,
    hadamard_product,
    kronecker_factors,
    largest_factor,
    paley,
    sylvester,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TINY = 1e-7

# By q + 1 for a prime q = 3 mod 4, and by 2 (q + 1) for a prime q = 1 mod 4.
PALEY = [4, 12, 20, 28, 36, 44, 60, 76, 108, 148, 200, 228]
NOT_PALEY = [1, 2, 6, 16, 40, 52, 63, 92, 100, 137, 172]

# The widths of real models, with the split that the product then uses.
SPLITS = {
    1: (1, 1),
    96: (12, 8),
    160: (20, 8),
    192: (12, 16),
    1536: (12, 128),
    3584: (28, 128),
    4864: (76, 64),
    5120: (20, 256),
    8192: (1, 8192),
    9728: (76, 128),
    14336: (28, 512),
    17408: (68, 256),
    18944: (148, 128),
    25600: (200, 128),
}


def dense(order: int) -> Tensor:
    """The matrix that the product stands for, float64: whole numbers are exact."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return reduce(torch.kron, (f.double() for f in kronecker_factors(order)), one)


def is_hadamard(matrix: Tensor) -> bool:
    n = matrix.shape[0]
    exact = matrix.double()
    return set(matrix.unique().tolist()) <= {-1, 1} and torch.equal(
        exact @ exact.T, n * torch.eye(n, dtype=torch.float64)
    )


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("order", PALEY)
def test_paley_is_hadamard(order):
    matrix = paley(order)
    assert matrix is not None
    assert matrix.shape == (order, order)
    assert matrix.dtype == torch.int8
    assert is_hadamard(matrix)


def test_paley_is_hadamard_or_absent():
    found = [order for order in range(1, 301) if paley(order) is not None]
    assert set(PALEY) <= set(found)
    assert not set(NOT_PALEY) & set(found)
    for order in found:
        matrix = paley(order)
        assert matrix is not None
        assert is_hadamard(matrix), order


@pytest.mark.parametrize("order", [1, 2, 4, 64, 256])
def test_sylvester_is_hadamard(order):
    assert sylvester(order).shape == (order, order)
    assert is_hadamard(sylvester(order))
    assert torch.equal(sylvester(order), sylvester(order).T)


def test_a_split_multiplies_to_its_order_and_is_hadamard():
    for order in range(1, 257):
        split = factors_of(order)
        if split is None:
            continue
        m, power = split
        assert m * power == order
        assert power.bit_count() == 1
        assert m == 1 or paley(m) is not None
        assert is_hadamard(dense(order)), order


@pytest.mark.parametrize("order", SPLITS)
def test_split_of_widths_of_real_models(order):
    assert factors_of(order) == SPLITS[order]
    factors = kronecker_factors(order)
    assert math.prod(factor.shape[0] for factor in factors) == order
    assert all(is_hadamard(factor) for factor in factors)


@pytest.mark.parametrize("order", [3, 63, 137, 172, 344, 2752])
def test_no_split(order):
    assert factors_of(order) is None
    with pytest.raises(ValueError, match=f"^no Hadamard matrix of order {order} can"):
        kronecker_factors(order)


@pytest.mark.parametrize(
    ("order", "largest"),
    [(1, 1), (63, 1), (100, 20), (137, 1), (160, 160), (172, 4), (2752, 64)],
)
def test_largest_factor(order, largest):
    assert largest_factor(order) == largest
    above = [d for d in range(largest + 1, order + 1) if order % d == 0]
    assert [d for d in above if factors_of(d) is not None] == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [1, 4, 16, 64, 256, 4096])
@pytest.mark.parametrize("rows", [1, 63])
def test_product_of_whole_numbers_is_exact(rows, order, device):
    """The square root of a power of 4 is exact, and so is all that is left."""
    x_LN = random(rows, order).mul(8).round().float()
    found_LN = hadamard_product(x_LN.to(device), order).cpu()
    expected_LN = x_LN.double() @ dense(order) / math.sqrt(order)
    assert torch.equal(found_LN.double(), expected_LN)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "order", "blocks"),
    [
        (1, 12, 1),
        (1, 2, 63),
        (63, 20, 1),
        (63, 96, 1),
        (137, 4, 43),
        (137, 160, 1),
        (137, 1536, 1),
        (3, 64, 5),
        (3, 4864, 1),
    ],
    ids=lambda number: str(number),
)
def test_product_keeps_to_the_budget_of_the_dense_product(rows, order, blocks, device):
    x_LN = random(rows, order * blocks)
    matrix = dense(order) / math.sqrt(order)
    exact_LN = (x_LN.reshape(-1, order) @ matrix).reshape(x_LN.shape)
    single_LN = x_LN.float().to(device)
    naive_LN = single_LN.reshape(-1, order) @ matrix.float().to(device)
    naive = rms(naive_LN.reshape(x_LN.shape).cpu() - exact_LN)
    found_LN = hadamard_product(single_LN, order)
    assert found_LN.shape == x_LN.shape
    assert found_LN.dtype == torch.float32
    assert rms(found_LN.cpu() - exact_LN) <= 2 * naive + TINY
    twice_LN = hadamard_product(x_LN.to(device), order).cpu()
    assert rms(twice_LN - exact_LN) <= 1e-14 * math.sqrt(order)


def test_product_refuses_an_order_that_it_cannot_build():
    with pytest.raises(ValueError, match="no Hadamard matrix of order 172"):
        hadamard_product(torch.ones(1, 172), 172)
