"""The solver is GPTQ, is never worse than rounding, and holds on where H is bad."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import Factor, factorise
from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.gptq.solver import Solution, solve
from rsq_stream.algorithm.grids.integer import IntegerGrid, decode
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import NumericalError
from rsq_stream.pipeline.block_solver import record
from rsq_stream.runtime.worker_pool import Pool, single_threaded_products
from tests.support import textbook_solver

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_bits = pytest.mark.parametrize("bits", [2, 3, 4])
each_scales = pytest.mark.parametrize("dynamic", [True, False], ids=["late", "early"])
STORAGE = torch.bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator)


def activations(tokens: int, inputs: int) -> Tensor:
    """Inputs that mix and differ in size, as those of a model do."""
    mix_II = torch.eye(inputs) + 0.1 * random(inputs, inputs)
    return random(tokens, inputs) * (0.1 + random(inputs).abs()) @ mix_II


def usual(inputs: int) -> Tensor:
    x_TI = activations(3 * inputs, inputs)
    return x_TI.T @ x_TI


def dead(inputs: int) -> Tensor:
    hessian_II = usual(inputs)
    hessian_II[::5] = 0
    hessian_II[:, ::5] = 0
    return hessian_II


def twins(inputs: int) -> Tensor:
    x_TI = activations(3 * inputs, inputs)
    x_TI[:, 1::2] = x_TI[:, : 2 * (inputs // 2) : 2]
    return x_TI.T @ x_TI


def few_tokens(inputs: int) -> Tensor:
    x_TI = activations(inputs // 7, inputs)
    return x_TI.T @ x_TI


def one_token(inputs: int) -> Tensor:
    x_TI = activations(1, inputs)
    return x_TI.T @ x_TI


def condition(inputs: int, decades: int = 8) -> Tensor:
    q_II = torch.linalg.qr(random(inputs, inputs).double()).Q
    hessian_II: Tensor = q_II * torch.logspace(0, -decades, inputs).double() @ q_II.T
    return hessian_II.float()


def zeros(inputs: int) -> Tensor:
    return torch.zeros(inputs, inputs)


NASTY = [usual, dead, twins, few_tokens, one_token, condition, zeros]


def make_grid(bits: int, symmetric: bool = True) -> IntegerGrid:
    return IntegerGrid(
        bits=bits,
        symmetric=symmetric,
        signed_scales=symmetric,
        clip_steps=80,
        storage_type=STORAGE,
    )


def hessian_from(matrix_II: Tensor, device: str = "cpu") -> Hessian:
    hessian = Hessian(len(matrix_II), 64, torch.device(device))
    hessian.matrix_II.copy_(matrix_II.triu())
    return hessian


def solved(
    weight_OI: Tensor,
    matrix_II: Tensor,
    grid: IntegerGrid,
    group_size: int,
    *,
    dynamic: bool = True,
    tile: int = 64,
    workers: int = 1,
    device: str = "cpu",
) -> tuple[Solution, Factor]:
    with single_threaded_products(workers) as pool:
        factor = factorise(hessian_from(matrix_II, device), 0.01, tile, pool)
        solution = solve(
            weight_OI.to(device),
            factor,
            grid,
            group_size,
            dynamic_scales=dynamic,
            tile_rows=50,
            pool=pool,
        )
    return solution, factor


def loss(error_OI: Tensor, matrix_II: Tensor) -> float:
    """tr(E H E^T) in float64."""
    error_OI, upper_II = error_OI.double(), matrix_II.double().triu()
    symmetric_II = upper_II + upper_II.triu(1).T
    return float(((error_OI @ symmetric_II) * error_OI).sum())


def errors_of(
    weight_OI: Tensor, found: Solution, grid: IntegerGrid
) -> tuple[Tensor, Tensor]:
    """Errors of the solution, and of rounding with the same scales."""
    scale_OG, zero_OG = found.scale_OG.cpu(), found.zero_OG.cpu()
    runs_LC = weight_OI.reshape(scale_OG.numel(), -1)
    near_LC = grid.nearest(runs_LC, scale_OG.flatten(), zero_OG.flatten())
    codes = (found.code_OI.cpu(), near_LC.reshape(weight_OI.shape).to(torch.uint8))
    first, second = (
        weight_OI - decode(code_OI, scale_OG, zero_OG, STORAGE) for code_OI in codes
    )
    return first, second


@each_device
@each_scales
@each_bits
@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size", "symmetric"),
    [
        (63, 137, -1, True),
        (137, 172, -1, False),
        (63, 128, 32, True),
        (63, 128, 64, False),
        (63, 256, 128, True),
        (9, 1120, 160, True),
        (9, 1100, -1, False),
    ],
    ids=lambda number: str(number),
)
def test_codes_are_those_of_the_textbook(
    outputs, inputs, group_size, symmetric, bits, dynamic, device
):
    weight_OI, matrix_II = 0.02 * random(outputs, inputs), usual(inputs)
    grid = make_grid(bits, symmetric)
    found, _ = solved(
        weight_OI, matrix_II, grid, group_size, dynamic=dynamic, device=device
    )
    expected = textbook_solver.gptq(
        weight_OI,
        matrix_II,
        bits,
        group_size,
        dynamic=dynamic,
        storage=STORAGE,
        symmetric=symmetric,
    )
    differs_OI = found.code_OI.cpu() != expected.codes_OI
    # A tie that falls to the other side changes what follows in its row: the
    # first code of a row that differs is counted, and the loss has to agree.
    firsts = int(differs_OI.any(1).sum())
    assert firsts <= math.ceil(0.001 * differs_OI.numel())
    weighted = loss(weight_OI - expected.decoded_OI, matrix_II)
    share = weighted / loss(weight_OI, matrix_II)
    assert found.relative_error == pytest.approx(share, rel=0.01 if firsts else 1e-4)
    if not firsts:
        assert torch.equal(found.scale_OG.cpu().double(), expected.scale_OG)
        assert torch.equal(found.zero_OG.cpu().double(), expected.zero_OG)


@each_device
@each_scales
@each_bits
@pytest.mark.parametrize(("inputs", "group_size"), [(137, -1), (160, 32)])
@pytest.mark.parametrize("make", NASTY, ids=lambda make: make.__name__)
def test_never_worse_than_rounding(make, inputs, group_size, bits, dynamic, device):
    weight_OI, matrix_II, grid = random(63, inputs), make(inputs), make_grid(bits)
    found, factor = solved(
        weight_OI, matrix_II, grid, group_size, dynamic=dynamic, device=device
    )
    ours, rounding = (
        loss(error_OI, matrix_II) for error_OI in errors_of(weight_OI, found, grid)
    )
    energy = loss(weight_OI, matrix_II)
    slack = 1e-6 * energy
    assert ours <= rounding + slack
    assert 0 <= found.relative_error <= found.rounding_error
    assert found.relative_error * energy == pytest.approx(ours, rel=1e-3, abs=slack)
    assert found.rounding_error * energy == pytest.approx(rounding, rel=1e-3, abs=slack)
    assert factor.dead_inputs == int((matrix_II.diagonal() == 0).sum())
    if make is zeros:
        assert found.relative_error == found.rounding_error == 0
        assert torch.equal(*errors_of(weight_OI, found, grid))


def test_rounding_is_kept_exactly_where_it_is_better():
    """One row at a time, as the textbook's losses in float64 foretell."""
    grid, seen = make_grid(2), set()
    for seed in range(20):
        weight_OI, base_II = random(1, 32, seed=seed), random(32, 32, seed=seed)
        matrix_II = base_II @ base_II.T / 32 + 0.05 * torch.eye(32)
        found, _ = solved(weight_OI, matrix_II, grid, -1)
        greedy = textbook_solver.gptq(weight_OI, matrix_II, 2, -1, storage=STORAGE)
        near = textbook_solver.rtn(weight_OI, 2, -1, storage=STORAGE)
        better, worse = (
            loss(weight_OI - made.decoded_OI, matrix_II) for made in (near, greedy)
        )
        kept = better < worse
        assert found.kept_rounding == kept, seed
        best = near if kept else greedy
        assert torch.equal(found.code_OI, best.codes_OI.to(torch.uint8))
        assert (found.relative_error == found.rounding_error) == kept
        seen.add(kept)
    assert seen == {True, False}


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_workers_do_not_change_a_bit(group_size, workers):
    weight_OI, matrix_II, grid = random(172, 160), usual(160), make_grid(3)
    one, first = solved(weight_OI, matrix_II, grid, group_size, tile=32)
    many, second = solved(
        weight_OI, matrix_II, grid, group_size, tile=32, workers=workers
    )
    for name in ("code_OI", "scale_OG", "zero_OG"):
        assert torch.equal(getattr(one, name), getattr(many, name))
    assert (one.relative_error, one.rounding_error) == (
        many.relative_error,
        many.rounding_error,
    )
    assert torch.equal(first.matrix_II, second.matrix_II)
    assert torch.equal(first.scale_I, second.scale_I)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_rounding_alone(group_size):
    weight_OI, grid = random(137, 160), make_grid(3)
    found = round_to_nearest(weight_OI, grid, group_size, tile_rows=50, pool=Pool(1))
    expected = textbook_solver.rtn(weight_OI, 3, group_size, storage=STORAGE)
    assert torch.equal(found.code_OI, expected.codes_OI.to(torch.uint8))
    assert torch.equal(found.scale_OG.double(), expected.scale_OG)
    error = (weight_OI - expected.decoded_OI).square().sum()
    share = float(error / weight_OI.double().square().sum())
    assert found.relative_error == found.rounding_error == pytest.approx(share)
    assert not found.kept_rounding


def test_record_says_what_was_done():
    found, factor = solved(random(63, 172), dead(172), make_grid(3), -1)
    made = record(
        7,
        "mlp.down_proj",
        Scheme(3, -1, symmetric=True),
        found,
        damping=factor.damping,
        attempts=factor.attempts,
        dead_inputs=factor.dead_inputs,
    )
    expected: dict[str, Any] = {
        "block": 7,
        "name": "model.layers.7.mlp.down_proj",
        "bits": 3,
        "group_size": -1,
        "relative_error": found.relative_error,
        "rounding_error": found.rounding_error,
        "kept_rounding": False,
        "damping": 0.01,
        "damping_attempts": 1,
        "dead_inputs": 35,
    }
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    """Codes would stand for anything, and the error would be said to be none."""
    weight_OI = random(16, 64)
    weight_OI[3, 5] = bad
    with pytest.raises(NumericalError, match="hold NaN or infinity"):
        solved(weight_OI, usual(64), make_grid(3), 32)
