"""The clip search finds a scale as good as the best, and the grid keeps its word."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.grids.integer import IntegerGrid, decode
from rsq_stream.ops.clip_search import best_scale, best_scale_naive

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_bits = pytest.mark.parametrize("bits", range(2, 9))
each_size = pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 137), (63, 63), (17, 172)]
)
each_exponent = pytest.mark.parametrize("exponent", [2.0, 2.4])
each_kind = pytest.mark.parametrize("kind", ["mirrored", "upright", "zero"])
each_storage = pytest.mark.parametrize(
    "storage", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "b16", "f16"]
)
STEPS = 80


def random(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randn(rows, columns, generator=generator)


def make_grid(
    bits: int, kind: str, storage: torch.dtype = torch.float32
) -> IntegerGrid:
    return IntegerGrid(
        bits=bits,
        symmetric=kind != "zero",
        signed_scales=kind == "mirrored",
        clip_steps=STEPS,
        storage_type=storage,
    )


def candidates(target_RC: Tensor, bits: int, kind: str) -> tuple[Tensor, Tensor]:
    """Scales from the full range down, and zero points; no row is all zeros."""
    low_R, high_R = target_RC.amin(1).clamp(max=0), target_RC.amax(1).clamp(min=0)
    if kind == "zero":
        full_R = (high_R - low_R) / (2**bits - 1)
        zero_R = (-low_R / full_R).round().clamp(0, 2**bits - 1)
    else:
        full_R = torch.maximum(-low_R, high_R) / (2 ** (bits - 1) - 1)
        zero_R = torch.full_like(full_R, 2 ** (bits - 1))
    return full_R[:, None] * (1 - 0.01 * torch.arange(STEPS)), zero_R


def errors_of(
    target_RC: Tensor, scale_RP: Tensor, zero_R: Tensor, top: int, exponent: float
) -> Tensor:
    """Error of each candidate in float64; signs are the scale's own."""
    scale_RP1, zero_R11 = scale_RP.double()[:, :, None], zero_R.double()[:, None, None]
    target_R1C = target_RC.double()[:, None]
    code_RPC = ((target_R1C / scale_RP1).round() + zero_R11).clamp(0, top)
    error_RPC = target_R1C - scale_RP1 * (code_RPC - zero_R11)
    return error_RPC.abs().pow(exponent).sum(2)


def search(twin: Callable[..., Tensor], given: Iterable[Tensor], *rest: Any) -> Tensor:
    return twin(*given, *rest).cpu()


def chosen(best_R: Tensor, scale_RP: Tensor) -> Tensor:
    """The candidates of the given indices, with their signs, ``[R, 1]``."""
    index_R = torch.where(best_R < 0, -1 - best_R, best_R)
    scale_R1 = scale_RP.gather(1, index_R[:, None])
    return torch.where(best_R[:, None] < 0, -scale_R1, scale_R1)


@each_device
@each_exponent
@each_kind
@each_bits
@each_size
def test_choice_is_as_good_as_the_naive_one(
    rows, columns, bits, kind, exponent, device
):
    target_RC, mirrored = random(rows, columns), kind == "mirrored"
    scale_RP, zero_R = candidates(target_RC, bits, kind)
    top = 2**bits - 1
    signed_RP = torch.cat([scale_RP, -scale_RP], 1) if mirrored else scale_RP
    error_RP = errors_of(target_RC, signed_RP, zero_R, top, exponent)
    least_R = error_RP.amin(1)
    naive_R = best_scale_naive(target_RC, scale_RP, zero_R, top, exponent, mirrored)
    there = (value.to(device) for value in (target_RC, scale_RP, zero_R))
    found_R = search(best_scale, there, top, exponent, mirrored)
    assert found_R.dtype == torch.int64
    assert bool((found_R < STEPS).all())
    assert bool((found_R >= (-STEPS if mirrored else 0)).all())
    regrets = []
    for best_R in (naive_R, found_R):
        scale_R1 = chosen(best_R, scale_RP)
        error_R = errors_of(target_RC, scale_R1, zero_R, top, exponent)[:, 0]
        regrets.append(float((error_R - least_R).amax() / error_RP.amax()))
    naive, found = regrets
    assert found <= 2 * naive + 1e-6


@each_device
@each_bits
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 137])
def test_choice_is_equal_where_all_sums_are_exact(rows, mirrored, bits, device):
    """Whole numbers and powers of two: no rounding, so ties are ties for both."""
    target_RC = (random(rows, 64) * 3 * 2**bits).round() / 8
    scale_RP = torch.tensor([8.0, 4.0, 4.0, 2.0, 1.0, 0.5]).repeat(rows, 1)
    zero_R = torch.full((rows,), float(2 ** (bits - 1)))
    there = [value.to(device) for value in (target_RC, scale_RP, zero_R)]
    found_R = search(best_scale, there, 2**bits - 1, 2.0, mirrored)
    exact = [value.double() for value in (target_RC, scale_RP, zero_R)]
    naive_R = search(best_scale_naive, exact, 2**bits - 1, 2.0, mirrored)
    assert torch.equal(found_R, naive_R)


@each_device
def test_ties_go_to_the_earlier_and_to_the_upright(device):
    scale_RP = torch.tensor([[4.0, 1.0, 1.0, 0.5]]).repeat(4, 1)
    rows = [[0.0, 0.0], [1.0, -1.0], [-2.0, 1.0], [2.0, -1.0]]
    zero_R = torch.full((4,), 2.0)
    given = [value.to(device) for value in (torch.tensor(rows), scale_RP, zero_R)]
    for twin in (best_scale, best_scale_naive):
        # 2 bits reach from -2 to 1: the last row fits the mirrored grid alone.
        assert search(twin, given, 3, 2.0, True).tolist() == [0, 1, 1, -2]


@each_device
@pytest.mark.parametrize("columns", [1, 63, 137])
@each_bits
@each_kind
def test_rows_without_anything_to_fit(kind, bits, columns, device):
    """Zeros, a constant, values next to the ends of the type: nothing breaks."""
    values = [0.0, 0.02, -7.0, 1e-38, -1e-38, 3e37, -3e37]
    target_RC = torch.tensor(values)[:, None].repeat(1, columns)
    grid = make_grid(bits, kind)
    scale_R, zero_R = (part.cpu() for part in grid.search(target_RC.to(device)))
    assert scale_R[0] == 1
    assert bool((scale_R != 0).all())
    code_RC = grid.nearest(target_RC, scale_R, zero_R)
    decoded_RC = grid.levels(scale_R, zero_R).gather(1, code_RC.long())
    assert torch.equal(decoded_RC[0], target_RC[0])
    error_RC = (decoded_RC - target_RC).abs() / target_RC.abs().clamp(min=1e-38)
    # One of a grid of 2 bits is 1 or 2 steps away from 0; more bits are finer.
    assert float(error_RC.max()) <= 0.26


@each_device
@each_storage
@each_kind
@each_bits
@pytest.mark.parametrize("columns", [1, 63, 137])
def test_scales_and_levels_are_storable(columns, bits, kind, storage, device):
    grid = make_grid(bits, kind, storage)
    target_RC = random(63, columns) * torch.logspace(-4, 3, 63)[:, None]
    scale_R, zero_R = (part.cpu() for part in grid.search(target_RC.to(device)))
    assert torch.equal(scale_R, scale_R.to(storage).float())
    assert bool(torch.isfinite(scale_R).all())
    assert bool((zero_R == zero_R.round().clamp(0, grid.top)).all())
    if kind == "upright":
        assert bool((scale_R > 0).all())
    if kind != "zero":
        assert bool((zero_R == 2 ** (bits - 1)).all())
    level_RL = grid.levels(scale_R, zero_R)
    assert level_RL.shape == (63, 2**bits)
    code_RL = torch.arange(2**bits, dtype=torch.uint8).repeat(63, 1)
    decoded_RL = decode(code_RL, scale_R[:, None], zero_R[:, None], storage)
    assert torch.equal(level_RL, decoded_RL)
    # Rounding brings each level back to its code, as far as the type tells them apart.
    off_RL = grid.nearest(level_RL, scale_R, zero_R) - code_RL
    rounding_RL = (code_RL - zero_R[:, None]).abs() * torch.finfo(storage).eps / 2
    assert bool((off_RL.abs() <= 0.5 + rounding_RL).all())


@each_device
@each_kind
@each_bits
def test_search_is_never_worse_than_the_full_range(bits, kind, device):
    target_RC, grid = random(137, 63), make_grid(bits, kind)
    full = IntegerGrid(
        bits=bits,
        symmetric=grid.symmetric,
        signed_scales=False,
        clip_steps=1,
        storage_type=torch.float32,
    )
    errors = []
    for tried in (grid, full):
        scale_R, zero_R = (part.cpu() for part in tried.search(target_RC.to(device)))
        arguments = (target_RC, scale_R[:, None], zero_R, grid.top, 2.0)
        errors.append(errors_of(*arguments)[:, 0])
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
    if bits <= 4:
        assert float(errors[0].sum()) < float(errors[1].sum())


@each_device
@each_storage
@pytest.mark.parametrize(
    ("bits", "upright", "mirrored"), [(2, 0.1425, 0.1229), (3, 0.0358, 0.0310)]
)
def test_mirrored_grids_improve_gaussian_groups_of_64(
    bits, upright, mirrored, storage, device
):
    """The figures of the design: relative squared error, within 2 %."""
    generator = torch.Generator().manual_seed(64)
    target_RC = torch.randn(4096, 64, generator=generator)
    for kind, expected in (("upright", upright), ("mirrored", mirrored)):
        grid = make_grid(bits, kind, storage)
        scale_R, zero_R = (part.cpu() for part in grid.search(target_RC.to(device)))
        code_RC = grid.nearest(target_RC, scale_R, zero_R).long()
        error_RC = target_RC - grid.levels(scale_R, zero_R).gather(1, code_RC)
        share = error_RC.double().square().sum() / target_RC.double().square().sum()
        assert float(share) == pytest.approx(expected, rel=0.02)
        assert bool((scale_R < 0).any()) == (kind == "mirrored")


@each_device
@each_storage
@each_kind
@each_bits
@pytest.mark.parametrize("steps", [1, 2, 80])
def test_the_whole_search_is_its_twin(steps, bits, kind, storage, device):
    """Ranges from far below to far above what a type holds, both layouts, zeros."""
    target_RC = random(63, 37) * torch.logspace(-40, 30, 63)[:, None]
    target_RC[5] = 0
    grid = replace(make_grid(bits, kind, storage), clip_steps=steps)
    for there_RC in (target_RC.to(device), target_RC.to(device).T.contiguous().T):
        found, twin = grid.search(there_RC), grid.search_naive(there_RC)
        assert all(torch.equal(a, b) for a, b in zip(found, twin, strict=True))
