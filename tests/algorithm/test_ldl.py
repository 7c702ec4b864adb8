"""One block by the library, and the whole factor from its blocks."""

import warnings
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import Factor, factor_block, factorise, wide_blocks
from rsq_stream.errors import NumericalError
from rsq_stream.runtime.worker_pool import Pool, single_threaded_products

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_size = pytest.mark.parametrize("size", [1, 2, 63, 128, 137])
WIDE = "rsq_stream.algorithm.gptq.ldl._WIDE"
LOOKS = "rsq_stream.algorithm.gptq.ldl._looks_at_each_block"


def positive(size: int, decades: float = 2.0) -> Tensor:
    """A positive definite matrix in float64, rounded to what fp32 holds."""
    generator = torch.Generator().manual_seed(size)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q_CC = torch.linalg.qr(gaussian).Q
    scaled_CC = q_CC * torch.logspace(0, -decades, size, dtype=torch.float64)
    matrix_CC: Tensor = (scaled_CC @ q_CC.T).float().double()
    return matrix_CC.triu() + matrix_CC.triu(1).T


def off(root_CC: Tensor, matrix_CC: Tensor) -> float:
    """How far R R^T is from A, relative to A."""
    upper_CC = root_CC.cpu().double().triu()
    return float((upper_CC @ upper_CC.T - matrix_CC).norm() / matrix_CC.norm())


def by_the_textbook(matrix_CC: Tensor) -> Tensor:
    """A = R R^T column by column, from the last, in the type of A."""
    root_CC, left_CC = torch.zeros_like(matrix_CC), matrix_CC.clone()
    for k in reversed(range(len(matrix_CC))):
        root_CC[: k + 1, k] = left_CC[: k + 1, k] / left_CC[k, k].sqrt()
        left_CC[:k, :k] -= root_CC[:k, k, None] * root_CC[:k, k]
    return root_CC


@each_device
@each_size
@pytest.mark.parametrize("decades", [0, 2, 5])
def test_block_keeps_to_the_budget_of_the_textbook(decades, size, device):
    matrix_CC = positive(size, decades)
    naive_CC = by_the_textbook(matrix_CC.float())
    found_CC = matrix_CC.float().to(device)
    assert factor_block(found_CC) == -1
    assert bool((found_CC.diagonal() > 0).all())
    assert off(found_CC, matrix_CC) <= 2 * off(naive_CC, matrix_CC) + 1e-7


@each_device
@each_size
def test_block_reads_the_upper_triangle_only(size, device):
    matrix_CC = positive(size).float().to(device)
    poison_CC = torch.full_like(matrix_CC, torch.nan).tril(-1)
    clean_CC, poisoned_CC = matrix_CC.clone(), matrix_CC.triu() + poison_CC
    assert factor_block(clean_CC) == factor_block(poisoned_CC) == -1
    assert torch.equal(poisoned_CC, clean_CC)
    assert not clean_CC.tril(-1).any()


@each_device
@pytest.mark.parametrize("size", [1, 63, 137])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_block_names_the_first_bad_pivot_from_below(value, size, device):
    for index in {0, size // 2, size - 1}:
        matrix_CC = torch.eye(size, device=device)
        matrix_CC[index, index] = value
        matrix_CC[0, 0] = value  # the last that is reached
        assert factor_block(matrix_CC) == index


@each_device
def test_block_may_be_a_view(device):
    wide_II = torch.full((137, 137), torch.nan, device=device)
    wide_II[20:83, 30:93] = positive(63).float().to(device)
    alone_CC = wide_II[20:83, 30:93].clone()
    assert factor_block(alone_CC) == factor_block(wide_II[20:83, 30:93]) == -1
    assert torch.equal(wide_II[20:83, 30:93], alone_CC)
    assert int(wide_II.isnan().sum()) == 137**2 - 63**2


def factor_of(
    matrix_II: Tensor, *, tile: int, damping: float = 0.01, device: str = "cpu"
) -> Factor:
    """Factor a copy; below its blocks a Hessian holds nothing yet: poison."""
    inputs = len(matrix_II)
    hessian = Hessian(inputs, 32, torch.device(device))
    hessian.matrix_II.copy_(matrix_II.triu())
    for start in range(0, inputs, tile):
        hessian.matrix_II[start + tile :, start : start + tile] = torch.nan
    with single_threaded_products(2) as pool:
        return factorise(hessian, damping, tile, pool)


def upper_of(factor: Factor) -> Tensor:
    unit_II = factor.matrix_II.cpu().double().triu(1)
    return unit_II + torch.eye(len(unit_II), dtype=torch.float64)


@each_device
@pytest.mark.parametrize(
    ("size", "tile"),
    [
        *product((1, 2, 63, 128, 137), (7, 32, 63, 128, 172)),
        *((1100, 63), (1100, 128), (1536, 128)),  # of several wide panels
    ],
)
def test_factor_keeps_to_the_budget_of_the_textbook(tile, size, device):
    matrix_II = positive(size, decades=4)
    factor = factor_of(matrix_II, tile=tile, device=device)
    mean = matrix_II.diagonal().mean()
    damped_II = matrix_II + 0.01 * mean * torch.eye(size)
    naive_II = by_the_textbook(damped_II.float())
    root_II = upper_of(factor) * factor.scale_I.cpu().double().sqrt()
    assert off(root_II, damped_II) <= 2 * off(naive_II, damped_II) + 1e-7
    assert bool((factor.scale_I > 0).all())
    assert (factor.damping, factor.attempts, factor.dead_inputs) == (0.01, 1, 0)
    unit_I = factor.matrix_II.diagonal().cpu()
    torch.testing.assert_close(unit_I, torch.ones(size), rtol=2e-7, atol=0)


@each_device
@pytest.mark.parametrize("size", [63, 137, 1100])
@pytest.mark.parametrize("tile", [7, 32, 63, 172])
def test_factor_keeps_the_hessian_beside_it(tile, size, device):
    matrix_II = positive(size).float()
    factor = factor_of(matrix_II, tile=tile, device=device)
    found_II = factor.matrix_II.cpu()
    runs = wide_blocks(size, tile)
    assert len(factor.blocks) == len(runs)
    for (start, end), block_WW in zip(runs, factor.blocks, strict=True):
        rows = slice(start, end)
        assert torch.equal(block_WW.cpu(), matrix_II[rows, rows])
        assert torch.equal(found_II[rows, :start], matrix_II[rows, :start])


def few_tokens(size: int) -> Tensor:
    """A Hessian of fewer tokens than inputs: fp32 alone decides which pivot fails."""
    generator = torch.Generator().manual_seed(size)
    x_TI = torch.randn(size // 3, size, generator=generator) + 0.5
    return x_TI.T @ x_TI


def same_factor(first: Factor, second: Factor, tile: int) -> bool:
    """Whether all that is read of two factors is equal, bit for bit."""
    size = len(first.scale_I)
    index = torch.arange(size)
    wide = wide_blocks(size, tile)[0][1]
    below = index[:, None] // wide > index // wide
    read = below | torch.ones(size, size).triu().bool()
    return all(
        torch.equal(a.cpu(), b.cpu())
        for a, b in [
            (first.matrix_II.cpu()[read], second.matrix_II.cpu()[read]),
            (first.scale_I, second.scale_I),
            *zip(first.blocks, second.blocks, strict=True),
        ]
    )


@each_device
@pytest.mark.parametrize("size", [63, 137, 172])
@pytest.mark.parametrize("tile", [32, 63])
def test_damping_grows_from_the_hessian_that_was_given(tile, size, device):
    matrix_II = few_tokens(size)
    grown = factor_of(matrix_II, tile=tile, damping=1e-12, device=device)
    assert grown.attempts > 1
    expected = 1e-12
    for _ in range(grown.attempts - 1):
        expected *= 10
    assert grown.damping == expected
    direct = factor_of(matrix_II, tile=tile, damping=grown.damping, device=device)
    assert direct.attempts == 1
    assert same_factor(grown, direct, tile)


@pytest.mark.parametrize("failing", range(1, 6))
@pytest.mark.parametrize("looks", [True, False])
def test_damping_grows_whichever_block_fails(failing, looks, monkeypatch):
    """NaN from a failed block spreads, where nobody looks, but H is there again."""
    matrix_II, calls = positive(137).float(), []

    def fail_once(block_CC: Tensor) -> Tensor:
        calls.append(block_CC)
        if len(calls) == failing:
            block_CC.fill_(torch.nan)
            return torch.tensor(0)
        return factor_block(block_CC)

    monkeypatch.setattr(WIDE, 32)  # five blocks
    direct = factor_of(matrix_II, tile=32, damping=0.1)
    monkeypatch.setattr("rsq_stream.algorithm.gptq.ldl.factor_block", fail_once)
    monkeypatch.setattr(LOOKS, lambda _: looks)
    grown = factor_of(matrix_II, tile=32)
    assert (grown.attempts, grown.damping) == (2, 0.1)
    assert len(calls) == (failing if looks else 5) + 5
    assert same_factor(grown, direct, 32)


@pytest.mark.parametrize("size", [63, 137, 172])
def test_one_look_at_the_end_gives_the_same(size, monkeypatch):
    """What a GPU does, on the CPU: a Hessian that takes several attempts, and none."""
    monkeypatch.setattr(WIDE, 32)
    hard_II, bad_II = few_tokens(size), positive(size).float()
    bad_II[0, size // 2] = -1e9
    looked = factor_of(hard_II, tile=32, damping=1e-12)
    assert looked.attempts > 1
    monkeypatch.setattr(LOOKS, lambda _: False)
    waited = factor_of(hard_II, tile=32, damping=1e-12)
    assert (waited.attempts, waited.damping) == (looked.attempts, looked.damping)
    assert same_factor(waited, looked, 32)
    with pytest.raises(NumericalError, match="not positive definite even with 100000"):
        factor_of(bad_II, tile=32)


@pytest.mark.parametrize("damping", [0.01, 1e-12])
def test_looks_do_not_grow_with_the_blocks(damping, monkeypatch):
    """A tensor that becomes a number is a wait, on a GPU."""
    looks: list[str] = []
    for name in ("__bool__", "__int__", "__float__", "item"):
        known = getattr(Tensor, name)

        def counted(self: Tensor, known: Any = known, name: str = name) -> Any:
            looks.append(name)
            return known(self)

        monkeypatch.setattr(Tensor, name, counted)
    monkeypatch.setattr(LOOKS, lambda _: False)
    monkeypatch.setattr(WIDE, 16)
    counts = []
    for size in (137, 320):
        looks.clear()
        made = factor_of(few_tokens(size), tile=16, damping=damping)
        counts.append(len(looks) - made.attempts)
    assert counts[0] == counts[1] <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("size", [137, 1000])
def test_a_gpu_factors_without_a_wait(size):
    """Not one, until the verdict; and NaN does not come through to the next attempt."""
    device = torch.device("cuda")
    factor_of(positive(size).float(), tile=32, device="cuda")  # libraries are loaded

    def waits(matrix_II: Tensor, damping: float) -> tuple[int, int]:
        hessian = Hessian(size, 32, device)
        hessian.matrix_II.copy_(matrix_II)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                made = factorise(hessian, damping, 32, Pool(1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len([w for w in seen if "synchroniz" in str(w.message)]), made.attempts

    for matrix_II, damping in ((positive(size), 0.01), (few_tokens(size), 1e-12)):
        found, attempts = waits(matrix_II.float(), damping)
        # The mean, the inputs that are dead, and each attempt's verdict.
        assert found == 2 + attempts


@each_device
@pytest.mark.parametrize("size", [1, 63, 137])
def test_hessian_of_zeros_becomes_the_identity(size, device):
    factor = factor_of(torch.zeros(size, size), tile=32, device=device)
    assert torch.equal(upper_of(factor), torch.eye(size, dtype=torch.float64))
    assert torch.equal(factor.scale_I.cpu(), torch.ones(size))
    assert (factor.dead_inputs, factor.attempts) == (size, 1)


@each_device
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 62, 136])
def test_bad_values_on_the_diagonal_are_named(index, bad, device):
    matrix_II = positive(137).float()
    matrix_II[index, index] = bad
    with pytest.raises(NumericalError, match="holds NaN or infinity on its diagonal"):
        factor_of(matrix_II, tile=32, device=device)


@each_device
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e9])
@pytest.mark.parametrize("place", [(0, 1), (0, 136), (31, 32), (100, 101)])
def test_bad_values_beside_the_diagonal_are_refused(place, bad, device):
    matrix_II = positive(137).float()
    matrix_II[place] = bad
    with pytest.raises(NumericalError) as caught:
        factor_of(matrix_II, tile=32, device=device)
    assert str(caught.value) == (
        "the Hessian is not positive definite even with 100000 times its mean diagonal"
        " added; the activations hold values that cannot be right"
    )
