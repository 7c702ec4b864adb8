"""Rounded activations against the formula in float64, group by group."""

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.activation_rounding import rounded
from tests.support import textbook_activations as textbook

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_grid = pytest.mark.parametrize("symmetric", [True, False])
ULP = 2.0**-23


def activations(*shape: int, seed: int = 0) -> Tensor:
    """Random, with one channel that is far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x[..., 0] *= 20
    return x


@each_device
@each_grid
@pytest.mark.parametrize("clip", [1.0, 0.37])
@pytest.mark.parametrize("group_size", [-1, 43])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounded_is_the_formula(bits, group_size, clip, symmetric, device):
    x_BTI = activations(2, 5, 172)
    more = {"symmetric": symmetric, "clip": clip}
    found = rounded(x_BTI.to(device), bits, group_size=group_size, **more).cpu()
    expected = textbook.rounded(x_BTI.double(), bits, group_size, **more)
    error = (found.double() - expected).abs()
    assert float((error / x_BTI.abs().amax(-1, keepdim=True)).max()) <= 4 * ULP
    assert found.dtype == torch.float32


@each_device
@each_grid
@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("constant", [0.0, 1.0, -3e-30, 7e30, 1e-45, -1e-38])
def test_rows_of_one_value(constant, clip, bits, symmetric, device):
    x_TI = torch.full((3, 63), constant, device=device)
    found_TI = rounded(x_TI, bits, symmetric=symmetric, clip=clip)
    assert bool(torch.isfinite(found_TI).all())
    if constant == 0:
        assert torch.equal(found_TI, x_TI)
    elif abs(constant) > 1e-30:  # others have a scale without full precision, or none
        expected_TI = textbook.rounded(
            x_TI.cpu().double(), bits, -1, symmetric=symmetric, clip=clip
        )
        error_TI = (found_TI.cpu().double() - expected_TI).abs()
        assert float(error_TI.max()) <= 8 * ULP * abs(constant)
        # The end of the range is a level, and without clipping it is the value.
        assert clip < 1 or float((found_TI - x_TI).abs().max()) <= 4 * ULP * abs(
            constant
        )


@each_grid
def test_zeros_among_others_stay_and_change_nothing(symmetric):
    x_TI = activations(4, 64)
    alone_TI = rounded(x_TI, 4, symmetric=symmetric)
    x_TI[1] = 0
    found_TI = rounded(x_TI, 4, symmetric=symmetric)
    assert bool((found_TI[1] == 0).all())
    assert torch.equal(found_TI[[0, 2, 3]], alone_TI[[0, 2, 3]])


@each_grid
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.5])
def test_a_group_has_no_more_levels_than_codes(bits, clip, symmetric):
    x_TI = activations(8, 4096)
    found_TI = rounded(x_TI, bits, symmetric=symmetric, clip=clip)
    for row_I in found_TI:
        assert len(row_I.unique()) <= 2**bits
    assert bool((found_TI[x_TI == 0] == 0).all())


@each_grid
def test_a_token_is_rounded_by_itself(symmetric):
    x_BTI = activations(3, 31, 96)
    whole_BTI = rounded(x_BTI, 4, group_size=32, symmetric=symmetric)
    for sequence in range(3):
        for token in (0, 17, 30):
            alone_I = rounded(
                x_BTI[sequence, token], 4, group_size=32, symmetric=symmetric
            )
            assert torch.equal(alone_I, whole_BTI[sequence, token])


@each_grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_computed_in_fp32_or_better(dtype, symmetric):
    x_TI = activations(5, 64).to(dtype)
    found_TI = rounded(x_TI, 4, symmetric=symmetric)
    wide = torch.promote_types(dtype, torch.float32)
    assert found_TI.dtype == dtype
    expected_TI = rounded(x_TI.to(wide), 4, symmetric=symmetric).to(dtype)
    assert torch.equal(found_TI, expected_TI)


@each_grid
def test_more_bits_lose_less(symmetric):
    x_TI = activations(32, 172)
    errors = [
        float((rounded(x_TI, bits, symmetric=symmetric) - x_TI).norm())
        for bits in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[2] / 12  # 4 bits more: a sixteenth of the step
