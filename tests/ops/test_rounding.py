"""Plain rounding is its twin bit for bit, and gives what is nearest."""

import pytest
import torch

from rsq_stream.ops.rounding import round_columns, round_columns_naive
from tests.ops.test_column_sweep import DEVICES, problem

each_device = pytest.mark.parametrize("device", DEVICES)


@each_device
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("zero", ["symmetric", "zero-points"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 63), (137, 172)])
def test_rounding_is_its_twin(rows, columns, bits, zero, device):
    given = problem(rows, columns, bits, zero)
    scales = (given.scale_R, given.zero_R, given.level_RL)
    made = round_columns(*(part.to(device) for part in (given.weight_RC, *scales)))
    twin = round_columns_naive(given.weight_RC, *scales)
    assert made.code_RC.dtype == torch.uint8
    assert all(torch.equal(a.cpu(), b) for a, b in zip(made, twin, strict=True))
    chosen_RC = given.level_RL.gather(1, twin.code_RC.long())
    assert torch.equal(twin.error_RC, given.weight_RC - chosen_RC)
    wanted_RC = given.weight_RC.double() / given.scale_R[:, None]
    wanted_RC = (wanted_RC + given.zero_R[:, None]).clamp(0, 2**bits - 1)
    assert float((wanted_RC - twin.code_RC).abs().max()) <= 0.5 + 1e-4
