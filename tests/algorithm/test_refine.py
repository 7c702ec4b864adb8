"""Refit and descent after the solver: never worse, and as the textbook has it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import Factor, factorise
from rsq_stream.algorithm.gptq.loss import weighted_losses
from rsq_stream.algorithm.gptq.solver import Solution, solve
from rsq_stream.algorithm.grids.integer import IntegerGrid, decode
from rsq_stream.ops.descent import descend, descend_naive
from rsq_stream.runtime.worker_pool import Pool
from tests.support.textbook_solver import Quantized, descent, gptq

CASES = [
    (48, 96, 32, 2, torch.float32),
    (63, 172, -1, 3, torch.bfloat16),
    (5, 137, -1, 2, torch.float32),
    (40, 256, 64, 2, torch.bfloat16),
    (17, 128, 128, 4, torch.float16),
    (9, 1120, 160, 3, torch.float32),
]
"""Outputs, inputs, group size, bits, stored type."""
IDS = ["O{}-I{}-g{}-b{}-{}".format(*case) for case in CASES]


def problem(outputs: int, inputs: int, tile: int = 64) -> tuple[Tensor, Factor, Tensor]:
    """Return weights, their factor, and H + lambda I."""
    random = torch.Generator().manual_seed(outputs * inputs)
    mix_II = torch.randn(inputs, inputs, generator=random) / inputs**0.5
    x_TI = torch.randn(3 * inputs, inputs, generator=random) @ mix_II
    hessian = Hessian(inputs, 64, torch.device("cpu"))
    hessian.add([(x_TI, torch.ones(len(x_TI)))], Pool(1))
    whole_II = hessian.matrix_II.triu() + hessian.matrix_II.triu(1).T
    whole_II.diagonal().add_(0.01 * whole_II.diagonal().mean())
    weight_OI = torch.randn(outputs, inputs, generator=random)
    return weight_OI, factorise(hessian, 0.01, tile, Pool(1)), whole_II


def grid_of(bits: int, storage: torch.dtype, symmetric: bool = True) -> IntegerGrid:
    return IntegerGrid(
        bits=bits,
        symmetric=symmetric,
        signed_scales=symmetric,
        clip_steps=80,
        storage_type=storage,
    )


def solved(
    weight_OI: Tensor, factor: Factor, grid: IntegerGrid, group: int, **options: object
) -> Solution:
    settings = {"dynamic_scales": True, "tile_rows": 32, "pool": Pool(1)}
    return solve(weight_OI, factor, grid, group, **(settings | options))  # type: ignore[arg-type]


def loss(
    weight_OI: Tensor, found: Solution, grid: IntegerGrid, whole_II: Tensor
) -> Tensor:
    """Return each row's loss in float64, values as a loader decodes them."""
    decoded_OI = decode(found.code_OI, found.scale_OG, found.zero_OG, grid.storage_type)
    error_OI = (weight_OI - decoded_OI).double()
    return (error_OI @ whole_II.double() * error_OI).sum(1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("tile", [32, 64, 128])
def test_the_factor_keeps_the_hessian(case: tuple[Any, ...], tile: int) -> None:
    inputs = case[1]
    _, factor, whole_II = problem(case[0], inputs, tile)
    one_II = torch.eye(inputs)
    for start, end in ((0, 1), (5, 40), (0, inputs), (inputs - 33, inputs)):
        columns_IW, among_WW = factor.gradients(one_II, start, end)
        assert torch.allclose(columns_IW, whole_II[:, start:end], rtol=1e-6, atol=1e-6)
        assert torch.equal(among_WW, columns_IW[start:end])


@pytest.mark.parametrize("rows", [1, 63, 300])
@pytest.mark.parametrize(("inputs", "tile"), [(137, 32), (1100, 64), (1100, 1024)])
def test_losses_are_those_of_the_formula(rows: int, inputs: int, tile: int) -> None:
    _, factor, whole_II = problem(2, inputs, tile)
    undamped_II = whole_II.double().clone()
    undamped_II.diagonal().sub_(factor.damp)
    random = torch.Generator().manual_seed(rows)
    parts = [torch.randn(rows, inputs, generator=random) for _ in range(3)]
    expected = [float((p.double() @ undamped_II * p.double()).sum()) for p in parts]
    found = weighted_losses(parts, factor)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_no_row_gets_worse_and_most_get_better(
    case: tuple[Any, ...], symmetric: bool
) -> None:
    outputs, inputs, group, bits, storage = case
    weight_OI, factor, whole_II = problem(outputs, inputs)
    grid = grid_of(bits, storage, symmetric)
    plain = loss(weight_OI, solved(weight_OI, factor, grid, group), grid, whole_II)
    # Decoded values are rounded to the stored type after the step was judged.
    slack = 1 + 1e-6 if storage == torch.float32 else 1.005
    before = plain
    for options in ({"refit": True}, {"sweeps": 1}, {"sweeps": 2, "refit": True}):
        found = solved(weight_OI, factor, grid, group, **options)
        now = loss(weight_OI, found, grid, whole_II)
        assert (now <= plain * slack).all(), options
        assert float(now.sum()) < float(plain.sum())
        before = now
    assert float(before.sum()) < 0.98 * float(plain.sum())


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_scales_are_exact_in_the_stored_type(case: tuple[Any, ...]) -> None:
    outputs, inputs, group, bits, storage = case
    weight_OI, factor, _ = problem(outputs, inputs)
    found = solved(weight_OI, factor, grid_of(bits, storage), group, refit=True)
    assert torch.equal(found.scale_OG, found.scale_OG.to(storage).float())
    assert not torch.equal(
        found.scale_OG,
        solved(weight_OI, factor, grid_of(bits, storage), group).scale_OG,
    )


@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "bits"), [(48, 96, 32, 2), (40, 256, 64, 3)]
)
@pytest.mark.parametrize("refit", [True, False])
def test_one_pass_is_that_of_the_textbook(
    outputs: int, inputs: int, group: int, bits: int, refit: bool
) -> None:
    weight_OI, factor, whole_II = problem(outputs, inputs)
    undamped_II = whole_II.double().clone()
    undamped_II.diagonal().sub_(factor.damp)
    grid = grid_of(bits, torch.float32)
    found = solved(weight_OI, factor, grid, group, sweeps=1, refit=refit)
    begun: Quantized = gptq(weight_OI, undamped_II, bits, group)
    wanted = descent(weight_OI, undamped_II, begun, bits, refit=refit, damping=0.01)
    same = (found.code_OI == wanted.codes_OI).double().mean()
    assert float(same) >= 0.999


@pytest.mark.parametrize("rows", [1, 63])
@pytest.mark.parametrize("columns", [1, 43, 137])
@pytest.mark.parametrize("bits", [2, 4])
def test_descent_agrees_with_its_twin(rows: int, columns: int, bits: int) -> None:
    random = torch.Generator().manual_seed(rows + columns)
    root_CC = torch.randn(columns, 2 * columns, generator=random)
    hessian_CC = root_CC @ root_CC.T / columns
    code_RC = torch.randint(0, 1 << bits, (rows, columns), generator=random)
    pull_RC = torch.randn(rows, columns, generator=random)
    scale_R = torch.rand(rows, generator=random) - 0.5
    zero_R = torch.full((rows,), float(1 << (bits - 1)))
    level_RL = (torch.arange(float(1 << bits)) - zero_R[:, None]) * scale_R[:, None]
    given = (code_RC.to(torch.uint8), pull_RC, hessian_CC, scale_R, zero_R, level_RL)
    fast, naive = descend(*given), descend_naive(*given)
    assert float((fast == naive).double().mean()) >= 0.999
    assert torch.equal(given[0], code_RC.to(torch.uint8))  # inputs are left alone


@pytest.mark.parametrize("options", [{"sweeps": 2, "refit": True}, {"refit": True}])
def test_rows_are_independent(options: dict[str, object]) -> None:
    weight_OI, factor, _ = problem(63, 172)
    grid = grid_of(3, torch.bfloat16)
    whole = solved(weight_OI, factor, grid, -1, **options)
    tail = solved(weight_OI[32:], factor, grid, -1, **options)
    assert torch.equal(whole.code_OI[32:], tail.code_OI)
    assert torch.equal(whole.scale_OG[32:], tail.scale_OG)
