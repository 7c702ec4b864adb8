"""The sweep is its naive twin bit for bit, and rounds what float64 says it should."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rsq_stream.ops.column_sweep import Swept, sweep, sweep_naive

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_bits = pytest.mark.parametrize("bits", range(2, 9))
each_size = pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 137), (63, 63), (137, 32), (5, 172)]
)
each_zero = pytest.mark.parametrize("zero", ["symmetric", "zero-points"])


class Given(NamedTuple):
    """The arguments of a sweep."""

    target_RC: Tensor
    weight_RC: Tensor
    upper_CC: Tensor
    scale_R: Tensor
    zero_R: Tensor
    level_RL: Tensor

    def to(self, device: str) -> "Given":
        return Given(*(value.to(device).clone() for value in self))


def problem(
    rows: int, columns: int, bits: int, zero: str, storage: torch.dtype = torch.bfloat16
) -> Given:
    """Scales of both signs; what is not above the diagonal of U is poison."""
    generator = torch.Generator().manual_seed(rows * columns + bits)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight_RC = random(rows, columns)
    upper_CC = (random(columns, columns) / columns**0.5).triu(1)
    upper_CC += torch.full((columns, columns), torch.nan).tril()
    scale_R = (4 / 2**bits * (0.5 + random(rows).abs())).to(storage).float()
    scale_R[::2] *= -1
    zero_R = torch.full((rows,), float(2 ** (bits - 1)))
    if zero == "zero-points":
        zero_R = torch.randint(2**bits, (rows,), generator=generator).float()
    code_L = torch.arange(2**bits, dtype=torch.float32)
    level_RL = ((code_L - zero_R[:, None]) * scale_R[:, None]).to(storage).float()
    target_RC = weight_RC + 0.3 * random(rows, columns)
    return Given(target_RC, weight_RC, upper_CC, scale_R, zero_R, level_RL)


def same(given: Given, device: str) -> Swept:
    """What the sweep gives, after the twin was seen to give the same."""
    twin = sweep_naive(*given)
    found = Swept(*(part.cpu() for part in sweep(*given.to(device))))
    assert found.code_RC.dtype == torch.uint8
    assert found.error_RC.dtype == found.residual_RC.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, twin, strict=True))
    return found


@each_device
@each_zero
@each_bits
@each_size
def test_sweep_is_its_twin(rows, columns, bits, zero, device):
    given = problem(rows, columns, bits, zero)
    code_RC, error_RC, residual_RC = same(given, device)
    chosen_RC = given.level_RL.gather(1, code_RC.long())
    assert torch.equal(error_RC, given.weight_RC - chosen_RC)
    upper_CC = given.upper_CC.double().triu(1)
    exact_RC = given.target_RC + error_RC.double() @ upper_CC - chosen_RC
    assert torch.allclose(residual_RC.double(), exact_RC, rtol=1e-4, atol=1e-5)


@each_device
@each_zero
@each_bits
@each_size
def test_each_code_is_the_nearest_to_its_target(rows, columns, bits, zero, device):
    """Targets from the errors in float64, without any recursion."""
    given = problem(rows, columns, bits, zero)
    code_RC, error_RC, _ = (part.cpu() for part in sweep(*given.to(device)))
    upper_CC = given.upper_CC.double().triu(1)
    target_RC = given.target_RC.double() + error_RC.double() @ upper_CC
    wanted_RC = target_RC / given.scale_R[:, None] + given.zero_R[:, None]
    off_RC = (wanted_RC.clamp(0, 2**bits - 1) - code_RC).abs()
    assert float(off_RC.max()) <= 0.5 + 1e-6 * 2**bits * columns


@each_device
@each_bits
def test_without_earlier_errors_it_is_rounding(bits, device):
    given = problem(63, 137, bits, "symmetric")
    given = given._replace(
        upper_CC=torch.zeros_like(given.upper_CC), target_RC=given.weight_RC
    )
    code_RC = same(given, device).code_RC
    code_RC = code_RC.double()
    exact_RC = given.weight_RC.double() / given.scale_R[:, None] + given.zero_R[:, None]
    assert float((exact_RC.clamp(0, 2**bits - 1) - code_RC).abs().max()) <= 0.5 + 1e-4


@each_device
def test_halves_go_to_the_even_step(device):
    steps = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    given = Given(
        target_RC=steps,
        weight_RC=steps,
        upper_CC=torch.zeros(6, 6),
        scale_R=torch.ones(1),
        zero_R=torch.full((1,), 4.0),
        level_RL=torch.arange(-4.0, 4.0)[None],
    )
    code_RC = same(given, device).code_RC
    assert code_RC.tolist() == [[2, 2, 4, 4, 6, 6]]


@each_device
@each_bits
@pytest.mark.parametrize("columns", [1, 63])
@pytest.mark.parametrize("value", [0.0, 0.7, -1e30, 1e-30, 3e38])
def test_rows_at_the_ends(value, columns, bits, device):
    """Zeros, constants, targets far outside of the grid, far below a step."""
    given = problem(5, columns, bits, "symmetric")
    outside_RC = torch.full((5, columns), value)
    given = given._replace(target_RC=outside_RC, weight_RC=outside_RC.clamp(-4, 4))
    code_RC, error_RC, _ = same(given, device)
    assert bool(torch.isfinite(error_RC).all())
    first_R = code_RC[:, 0].long()
    if value == 0 or abs(value) == 1e-30:
        assert torch.equal(first_R.float(), given.zero_R)
    if abs(value) > 1e29:
        up_R = given.scale_R * value > 0
        assert torch.equal(first_R, torch.where(up_R, 2**bits - 1, 0))


@each_device
def test_rows_do_not_know_each_other(device):
    given = problem(137, 63, 3, "zero-points")
    whole = sweep(*given.to(device))
    for rows in (slice(0, 1), slice(60, 63), slice(63, 137)):
        part = given._replace(
            target_RC=given.target_RC[rows],
            weight_RC=given.weight_RC[rows],
            scale_R=given.scale_R[rows],
            zero_R=given.zero_R[rows],
            level_RL=given.level_RL[rows],
        )
        for found, expected in zip(sweep(*part.to(device)), whole, strict=True):
            assert torch.equal(found, expected[rows])


@each_device
def test_views_are_as_good_as_copies(device):
    given = problem(63, 64, 3, "symmetric").to(device)
    wide_CC = torch.full((137, 137), torch.nan, device=device)
    wide_CC[5:69, 7:71] = given.upper_CC
    wide_RC = torch.full((63, 137), torch.nan, device=device)
    wide_RC[:, 3:67] = given.weight_RC
    views = given._replace(upper_CC=wide_CC[5:69, 7:71], weight_RC=wide_RC[:, 3:67])
    expected, found = sweep(*given.to(device)), sweep(*views)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert bool(wide_RC[:, :3].isnan().all())
    assert bool(wide_RC[:, 67:].isnan().all())
