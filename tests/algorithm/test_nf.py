"""NormalFloat: the tables of the paper, loops against their twins and a textbook."""

import math

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import Factor, factorise
from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.gptq.solver import solve
from rsq_stream.algorithm.grids.nf import NormalFloat, normal_values
from rsq_stream.ops.table import (
    best_table_scale,
    best_table_scale_naive,
    descend_table,
    descend_table_naive,
    sweep_table,
    sweep_table_naive,
)
from rsq_stream.runtime.worker_pool import Pool

TABLES = {
    2: "-1 0 .3379 1",
    3: "-1 -.4786 -.2171 0 .1609 .3379 .5626 1",
    # bitsandbytes' NF4.
    4: "-1 -.6962 -.5251 -.3949 -.2844 -.1848 -.0910 0"
    " .0796 .1609 .2461 .3379 .4407 .5626 .7230 1",
}


def grid_of(
    bits: int, storage: torch.dtype = torch.float32, signed: bool = True
) -> NormalFloat:
    return NormalFloat(
        bits=bits,
        symmetric=True,
        signed_scales=signed,
        clip_steps=80,
        storage_type=storage,
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", TABLES)
def test_the_values_are_those_of_the_tables(bits: int) -> None:
    expected = [float(value) for value in TABLES[bits].split()]
    assert normal_values(bits).tolist() == pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_values_are_quantiles(bits: int) -> None:
    value_L = normal_values(bits)
    assert len(value_L) == 1 << bits
    assert bool((value_L[1:] > value_L[:-1]).all())
    assert value_L[[0, (1 << bits) // 2 - 1, -1]].tolist() == [-1, 0, 1]
    # Back through the normal distribution, the steps on each side are even.
    top = math.sqrt(2) * torch.erfinv(torch.tensor(2 * 0.9677083 - 1.0)).item()
    share_L = torch.special.ndtr(value_L.double() * top)
    for side_L in (share_L[: (1 << bits) // 2], share_L[(1 << bits) // 2 - 1 :]):
        steps = side_L.diff()
        assert torch.allclose(steps, steps.mean().expand_as(steps), atol=1e-5)


@pytest.mark.parametrize(("bits", "lost"), [(2, 0.151), (3, 0.0409), (4, 0.0099)])
def test_a_gaussian_loses_what_the_reference_measured(bits: int, lost: float) -> None:
    weight_OI = random(48, 4096)
    upright = grid_of(bits, signed=False)
    made = round_to_nearest(weight_OI, upright, -1, tile_rows=64, pool=Pool(1))
    assert made.relative_error == pytest.approx(lost, rel=0.02)
    mirrored = round_to_nearest(
        weight_OI, grid_of(bits), -1, tile_rows=64, pool=Pool(1)
    )
    assert mirrored.relative_error <= made.relative_error


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest(bits: int) -> None:
    grid, value_L = grid_of(bits), normal_values(bits)
    weight_RC = 1.3 * random(7, 63)
    for scale_R in (random(7, seed=1).abs() + 0.1, -random(7, seed=2).abs() - 0.1):
        code_RC = grid.nearest(weight_RC, scale_R, torch.zeros(7)).long()
        level_RL = grid.levels(scale_R, torch.zeros(7))
        apart_RCL = (weight_RC[:, :, None] - level_RL[:, None]).abs()
        chosen_RC = apart_RCL.gather(2, code_RC[:, :, None])[:, :, 0]
        assert torch.allclose(chosen_RC, apart_RCL.amin(2), atol=1e-6)
        assert torch.equal(level_RL, value_L * scale_R[:, None])


@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("shape", [(1, 1), (63, 43), (5, 137)])
def test_loops_agree_with_their_twins(bits: int, shape: tuple[int, int]) -> None:
    rows, columns = shape
    value_L = normal_values(bits)
    root_CC = random(columns, 2 * columns, seed=3)
    hessian_CC = root_CC @ root_CC.T / columns
    upper_CC = torch.eye(columns) + 0.1 * random(columns, columns, seed=4).triu(1)
    weight_RC = random(rows, columns)
    target_RC = weight_RC + 0.1 * random(rows, columns, seed=5)
    scale_R = random(rows, seed=6)
    level_RL = (value_L * scale_R[:, None]).bfloat16().float()
    given = (target_RC, weight_RC, upper_CC, scale_R, value_L, level_RL)
    before_RC = target_RC.clone()
    code_RC, error_RC, residual_RC = sweep_table(*given)
    assert torch.equal(target_RC, before_RC)
    twin_RC, *_ = sweep_table_naive(*given)
    assert float((code_RC == twin_RC).double().mean()) > 0.99
    exact_RC = (target_RC - weight_RC).double() + error_RC.double() @ (
        upper_CC.double().triu(1) + torch.eye(len(upper_CC))
    )
    assert torch.allclose(residual_RC.double(), exact_RC, rtol=1e-4, atol=1e-5)
    assert torch.equal(error_RC, weight_RC - level_RL.gather(1, code_RC.long()))
    pull_RC = error_RC @ hessian_CC
    given = (code_RC, pull_RC, hessian_CC, scale_R, value_L, level_RL)
    moved_RC, twin_RC = descend_table(*given), descend_table_naive(*given)
    assert float((moved_RC == twin_RC).double().mean()) > 0.99


@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("exponent", [2.0, 2.4])
def test_the_scale_search_finds_the_best(
    bits: int, mirrored: bool, exponent: float
) -> None:
    weight_RC = random(17, 43)
    scale_RP = weight_RC.abs().amax(1, keepdim=True) * torch.linspace(1, 0.3, 20)
    value_L = normal_values(bits)
    every_RQ = torch.cat([scale_RP, -scale_RP.flip(1)], 1) if mirrored else scale_RP
    level_RQL = every_RQ[:, :, None].double() * value_L
    apart_RCQL = (weight_RC[:, :, None, None] - level_RQL[:, None]).abs()
    error_RQ = apart_RCQL.amin(3).pow(exponent).sum(1)
    given = (weight_RC, scale_RP, value_L, exponent, mirrored)
    for found in (best_table_scale, best_table_scale_naive):
        # A negative index, -1 - p, counts from the end.
        chosen_R1 = (found(*given) % every_RQ.shape[1])[:, None]
        chosen_R = error_RQ.gather(1, chosen_R1)[:, 0]
        assert torch.allclose(chosen_R, error_RQ.amin(1), rtol=1e-5)


def problem(outputs: int, inputs: int) -> tuple[Tensor, Factor, Tensor]:
    """Return weights, their factor, and H + lambda I in float64."""
    mix_II = random(inputs, inputs, seed=7) / math.sqrt(inputs)
    hessian = Hessian(inputs, 64, torch.device("cpu"))
    x_TI = random(3 * inputs, inputs, seed=8) @ mix_II
    hessian.add([(x_TI, torch.ones(len(x_TI)))], Pool(1))
    whole_II = hessian.matrix_II.triu() + hessian.matrix_II.triu(1).T
    damped_II = whole_II.double()
    damped_II.diagonal().add_(0.01 * damped_II.diagonal().mean())
    factor = factorise(hessian, 0.01, 32, Pool(1))
    return random(outputs, inputs, seed=9), factor, damped_II


@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_solver_is_gptq_on_the_table(bits: int, group: int) -> None:
    """Against GPTQ by the inverse, column by column in float64, scales given."""
    weight_OI, factor, damped_II = problem(24, 96)
    made = solve(
        weight_OI,
        factor,
        grid_of(bits),
        group,
        dynamic_scales=False,
        tile_rows=16,
        pool=Pool(1),
    )
    left_OI = weight_OI.double().clone()
    inverse_II = torch.linalg.inv(damped_II)
    upper_II = torch.linalg.cholesky(inverse_II, upper=True)
    value_L = normal_values(bits).double()
    code_OI = torch.empty_like(made.code_OI)
    for k in range(96):
        scale_O = made.scale_OG[:, 0 if group == -1 else k // group].double()
        level_OL = value_L * scale_O[:, None]
        code_O = (left_OI[:, k, None] - level_OL).abs().argmin(1)
        code_OI[:, k] = code_O
        error_O = left_OI[:, k] - level_OL.gather(1, code_O[:, None])[:, 0]
        left_OI[:, k:] -= (error_O / upper_II[k, k])[:, None] * upper_II[k, k:]
    assert float((code_OI == made.code_OI).double().mean()) > 0.995
    assert not made.kept_rounding


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [-1, 32])
def test_refit_and_descent_make_no_row_worse(group: int, storage: torch.dtype) -> None:
    weight_OI, factor, damped_II = problem(24, 96)
    grid = grid_of(3, storage)

    def loss(sweeps: int, refit: bool) -> Tensor:
        made = solve(
            weight_OI,
            factor,
            grid,
            group,
            dynamic_scales=True,
            tile_rows=16,
            pool=Pool(1),
            sweeps=sweeps,
            refit=refit,
        )
        assert torch.equal(made.scale_OG, made.scale_OG.to(storage).float())
        error_OI = weight_OI - grid.decode(made.code_OI, made.scale_OG, made.zero_OG)
        return ((error_OI.double() @ damped_II) * error_OI).sum(1)

    plain_O = loss(0, False)
    slack = 1 + 1e-6 if storage == torch.float32 else 1.005
    for sweeps, refit in ((0, True), (1, False), (2, True)):
        assert bool((loss(sweeps, refit) <= plain_O * slack).all())
    assert float(loss(2, True).sum()) < 0.97 * float(plain_O.sum())
