"""H keeps to its budget, and neither workers nor batches change one bit of it."""

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.ops.two_terms import two_terms
from rsq_stream.runtime.worker_pool import single_threaded_products

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_size = pytest.mark.parametrize(
    ("tokens", "inputs"), [(1, 1), (1, 137), (63, 63), (500, 172), (137, 256)]
)
Units = list[tuple[Tensor, Tensor]]


def random_units(tokens: int, inputs: int, count: int = 1) -> Units:
    """Inputs with a mean, so that sums do not cancel; weights as a plan has them."""
    generator = torch.Generator().manual_seed(tokens + inputs)
    units = []
    for _ in range(count):
        x_TI = torch.randn(tokens, inputs, generator=generator) + 0.5
        weight_T = torch.rand(tokens, generator=generator).bfloat16().float()
        units.append((x_TI, weight_T))
    return units


def hessian_of(
    units: Units,
    *,
    panel: int = 64,
    workers: int = 1,
    batch: int = 1,
    device: str = "cpu",
) -> Tensor:
    """The upper triangle of H; ``batch`` units are added at a time."""
    inputs = units[0][0].shape[1]
    hessian = Hessian(inputs, panel, torch.device(device))
    with single_threaded_products(workers) as pool:
        for first in range(0, len(units), batch):
            run = units[first : first + batch]
            hessian.add([(x.to(device), w.to(device)) for x, w in run], pool)
    assert hessian.tokens == sum(len(x_TI) for x_TI, _ in units)
    assert hessian.matrix_II.dtype == torch.float32
    return hessian.matrix_II.cpu().triu()


def exact_hessian(units: Units) -> Tensor:
    parts = [x.double().T @ (w.double()[:, None] * x.double()) for x, w in units]
    return torch.stack(parts).sum(0).triu()


def naive_hessian(units: Units) -> Tensor:
    """One product of fp32 over all tokens."""
    x_TI = torch.cat([x_TI.float() for x_TI, _ in units])
    weight_T = torch.cat([weight_T for _, weight_T in units])
    return (x_TI.T @ (weight_T[:, None] * x_TI)).triu()


def off(found_II: Tensor, units: Units) -> float:
    exact_II = exact_hessian(units)
    return float((found_II.double() - exact_II).norm() / exact_II.norm())


@each_device
@pytest.mark.parametrize("panel", [32, 63, 512])
@each_size
def test_keeps_to_the_budget(tokens, inputs, panel, device):
    units = random_units(tokens, inputs, count=3)
    found_II = hessian_of(units, panel=panel, batch=2, device=device)
    assert off(found_II, units) <= 2 * off(naive_hessian(units), units) + 1e-7


@pytest.mark.gpu
@each_size
def test_two_terms_of_bfloat16_keep_to_the_budget(tokens, inputs):
    """The products of both terms are exact: only the sums round, as in fp32."""
    units = [(x.bfloat16(), w) for x, w in random_units(tokens, inputs, count=3)]
    found_II = hessian_of(units, device="cuda")
    assert off(found_II, units) <= 2 * off(naive_hessian(units), units) + 1e-7


def test_two_terms_of_bfloat16_are_exact():
    """Why two are enough: 8 bits times 8 bits are 16, of which each term has 8."""
    (x_TI, weight_T), *_ = random_units(137, 172)
    x_TI = x_TI.bfloat16().float()
    weighted_TI = weight_T[:, None] * x_TI
    high_TI = weighted_TI.bfloat16().float()
    low_TI = (weighted_TI - high_TI).bfloat16().float()
    assert torch.equal(
        high_TI.double() + low_TI.double(), weight_T.double()[:, None] * x_TI.double()
    )
    assert not torch.equal(high_TI, weighted_TI)


@pytest.mark.parametrize(
    ("size", "unit"), [(1.0, 1), (600.0, 1), (700.0, 2), (6e4, 128)]
)
def test_terms_of_float16_hold_what_a_weight_makes_too_large(size, unit):
    """A sink's massive activation times its weight is beyond 65504."""
    x_TI = random_units(63, 40)[0][0].half().clamp(-1, 1)
    weight_T = torch.ones(63)
    x_TI[5, 7] = -size
    weight_T[5] = 100.0
    high_TI, low_TI, found = two_terms(x_TI, torch.float16, weight_T)
    assert found == unit
    exact_TI = weight_T.double()[:, None] * x_TI.double()
    off_TI = found * (high_TI.double() + low_TI.double()) - exact_TI
    # Two terms have 21 bits, and end at the smallest number of the type.
    allowed_TI = exact_TI.abs() * 2**-21 + found * 2**-25
    assert (off_TI.abs() <= allowed_TI).all()


@pytest.mark.gpu
def test_a_hessian_of_float16_beyond_its_type():
    (x_TI, weight_T), *_ = random_units(137, 172)
    x_TI = x_TI.half()
    x_TI[3, 5] = 2000.0
    weight_T[3] = 100.0
    units = [(x_TI, weight_T)]
    found_II = hessian_of(units, device="cuda")
    assert off(found_II, units) <= 2 * off(naive_hessian(units), units) + 1e-6


@each_device
@each_size
def test_batches_do_not_change_a_bit(tokens, inputs, device):
    units = random_units(tokens, inputs, count=5)
    one_II = hessian_of(units, batch=1, device=device)
    for batch in (2, 3, 5):
        assert torch.equal(hessian_of(units, batch=batch, device=device), one_II)


@pytest.mark.parametrize("workers", [2, 4])
@each_size
def test_workers_do_not_change_a_bit(tokens, inputs, workers):
    units = random_units(tokens, inputs, count=3)
    one_II = hessian_of(units, workers=1)
    assert torch.equal(hessian_of(units, workers=workers, batch=3), one_II)


@each_device
def test_units_may_differ_in_length(device):
    units = random_units(63, 137) + random_units(1, 137) + random_units(172, 137)
    found_II = hessian_of(units, batch=3, device=device)
    assert torch.equal(found_II, hessian_of(units, device=device))
    assert off(found_II, units) <= 2 * off(naive_hessian(units), units) + 1e-7


@each_device
def test_uniform_weights_give_exactly_the_plain_hessian(device):
    units = random_units(63, 137, count=2)
    ones = [(x_TI, torch.ones_like(weight_T)) for x_TI, weight_T in units]
    plain_II = torch.zeros(137, 137, device=device)
    with single_threaded_products(1):
        for x_TI, _ in units:
            plain_II.addmm_(x_TI.to(device).T, x_TI.to(device))
    found_II = hessian_of(ones, panel=137, device=device)
    assert torch.equal(found_II, plain_II.cpu().triu())


@each_device
def test_tokens_of_weight_zero_are_not_there(device):
    (x_TI, weight_T), *_ = random_units(137, 63)
    weight_T[::2] = 0
    kept = [(x_TI[1::2].contiguous(), weight_T[1::2].contiguous())]
    found_II = hessian_of([(x_TI, weight_T)], device=device)
    assert off(found_II, kept) <= 2 * off(naive_hessian(kept), kept) + 1e-7


@each_device
@pytest.mark.parametrize("power", [-3, 1, 5])
def test_powers_of_two_scale_exactly(power, device):
    units = random_units(63, 137)
    scaled = [(x_TI, weight_T * 2.0**power) for x_TI, weight_T in units]
    expected_II = hessian_of(units, device=device) * 2.0**power
    assert torch.equal(hessian_of(scaled, device=device), expected_II)
