"""E8P: the codebook counted, the search against all codewords, the solver against
a textbook in float64, and the losses of the reference.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import Factor, factorise
from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.gptq.solver import Solution, solve
from rsq_stream.algorithm.grids.e8p import LatticeGrid
from rsq_stream.ops import e8p_codebook
from rsq_stream.ops.e8p import (
    descend_lattice,
    descend_lattice_naive,
    round_lattice,
    round_lattice_naive,
    rounding_errors,
    rounding_errors_naive,
    sweep_lattice,
    sweep_lattice_naive,
)
from rsq_stream.ops.e8p_codebook import (
    codeword_digits,
    digit_values,
    patterns,
    to_digits,
    to_indices,
)
from rsq_stream.runtime.worker_pool import Pool

CPU = torch.device("cpu")


class OneScale(LatticeGrid):
    """The lattice without trials: each row keeps the scale that is searched."""

    trials = ()


def grid_of(kind: type[LatticeGrid], storage: torch.dtype) -> LatticeGrid:
    return kind(
        bits=2, symmetric=True, signed_scales=False, clip_steps=80, storage_type=storage
    )


def codewords() -> Tensor:
    return digit_values()[codeword_digits().long()]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_patterns_are_those_of_the_paper() -> None:
    found = patterns()
    norms, counts = np.unique((found**2).sum(1), return_counts=True)
    expected = {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}
    assert dict(zip(norms.tolist(), counts.tolist(), strict=True)) == expected
    assert len(np.unique(found, axis=0)) == 256
    assert set(np.unique(found)) == {0.5, 1.5, 2.5}
    large = found[(found**2).sum(1) == 12]
    assert set(np.unique(large)) == {0.5, 1.5}
    # No coordinate is preferred among the 29.
    uses = (large == 0.5).sum(0)
    assert uses.max() - uses.min() <= 2


def test_the_codewords_are_a_part_of_a_shifted_lattice() -> None:
    # E8 + 1/4, taken to E8: all whole or all half, and an even sum.
    lattice_NC = codewords() - 0.25
    whole_N = (lattice_NC == lattice_NC.round()).all(1)
    half_N = (lattice_NC + 0.5 == (lattice_NC + 0.5).round()).all(1)
    assert bool((whole_N | half_N).all())
    assert bool((whole_N.sum() == half_N.sum()) & (lattice_NC.sum(1) % 2 == 0).all())
    # Its own mirror, so that a negative scale would say nothing new.
    mirror_ON = to_indices(11 - codeword_digits())
    assert len(torch.unique(mirror_ON)) == 1 << 16


def test_every_index_is_a_codeword_and_comes_back() -> None:
    index_ON = torch.arange(1 << 16, dtype=torch.int32).view(64, 1024)
    assert torch.equal(to_indices(to_digits(index_ON)), index_ON)
    with pytest.raises(ValueError, match="1 x 8 digits are not all codewords of E8P"):
        to_indices(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="not all codewords"):
        to_indices(torch.tensor([[6, 6, 6, 6, 6, 6, 6, 5]], dtype=torch.uint8))


@pytest.mark.parametrize("spread", [0.2, 1.0, 1.5, 4.0])
def test_the_nearest_codeword_is_that_of_exhaustive_search(spread: float) -> None:
    word_NC = codewords().double()
    # Beyond the ball too, and on the edges between cells.
    target_RC = torch.cat(
        [
            random(160, 8) * spread,
            random(80, 8, seed=1).sign() * spread,
            (random(80, 8, seed=2) * spread * 2).round() / 2,
        ]
    )
    one_R = torch.ones(len(target_RC))
    distance_RN = torch.cdist(target_RC.double(), word_NC)
    least_R = distance_RN.amin(1).square()
    for found in (round_lattice, round_lattice_naive):
        digit_RC = found(target_RC, one_R)
        to_indices(digit_RC)
        error_RC = target_RC.double() - digit_values().double()[digit_RC.long()]
        assert torch.allclose(error_RC.square().sum(1), least_R, rtol=1e-9, atol=1e-9)


def test_a_gaussian_loses_what_the_reference_measured() -> None:
    weight_OI = random(64, 4096)
    for scale, expected in ((1.03, 0.092), (0.9, 0.100)):
        digit_OI = round_lattice(weight_OI, torch.full((64,), 1 / scale))
        error_OI = weight_OI - digit_values()[digit_OI.long()] / scale
        lost = float(error_OI.square().sum() / weight_OI.square().sum())
        assert lost == pytest.approx(expected, rel=0.015)
    found = round_to_nearest(
        weight_OI, grid_of(LatticeGrid, torch.float32), -1, tile_rows=64, pool=Pool(1)
    )
    assert found.relative_error < 0.0915


def test_rows_of_zeros_and_of_one_value_lose_little() -> None:
    weight_OI = torch.zeros(3, 64)
    weight_OI[1], weight_OI[2, 5] = 0.01, 40.0
    for storage in (torch.float32, torch.bfloat16, torch.float16):
        grid = grid_of(LatticeGrid, storage)
        made = round_to_nearest(weight_OI, grid, -1, tile_rows=2, pool=Pool(1))
        back_OI = grid.decode(made.code_OI, made.scale_OG, made.zero_OG)
        assert bool(back_OI.isfinite().all())
        assert float(back_OI[0].abs().max()) < 1e-4
        assert torch.allclose(back_OI[1], weight_OI[1], rtol=0.02)
        assert bool((made.scale_OG > 0).all())


@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (63, 136)])
def test_faces_agree_with_their_twins(shape: tuple[int, int]) -> None:
    rows, columns = shape
    root_CC = random(columns, 2 * columns, seed=3)
    hessian_CC = root_CC @ root_CC.T / columns
    upper_CC = torch.eye(columns) + 0.1 * random(columns, columns, seed=4).triu(1)
    weight_RC, scale_R = random(rows, columns), random(rows, seed=5).abs() + 0.5
    target_RC = weight_RC + 0.1 * random(rows, columns, seed=6)
    level_RL = (digit_values() * scale_R[:, None]).bfloat16().float()
    given = (target_RC, weight_RC, upper_CC, scale_R, level_RL)
    unit_BCC = torch.stack(
        [
            torch.linalg.inv(upper_CC[at : at + 8, at : at + 8].triu())
            for at in range(0, columns, 8)
        ]
    )
    code_RC, error_RC, _ = sweep_lattice(*given)
    twin_RC, twin_error_RC, _ = sweep_lattice_naive(*given, unit_BCC)
    for made in (sweep_lattice(*given), sweep_lattice_naive(*given, unit_BCC)):
        owed_RC = (target_RC - weight_RC).double()
        exact_RC = owed_RC + made.error_RC.double() @ upper_CC.double()
        assert torch.allclose(made.residual_RC.double(), exact_RC, rtol=1e-4, atol=1e-5)
    assert float((code_RC == twin_RC).double().mean()) > 0.99
    if columns == 8:
        assert torch.equal(error_RC, twin_error_RC)
    assert torch.equal(error_RC, weight_RC - level_RL.gather(1, code_RC.long()))
    solved_BCC = torch.stack(
        [
            torch.linalg.inv(hessian_CC[at : at + 8, at : at + 8])
            for at in range(0, columns, 8)
        ]
    )
    pull_RC = error_RC @ hessian_CC
    moved_RC = descend_lattice(code_RC, pull_RC, hessian_CC, scale_R, level_RL)
    twin_RC = descend_lattice_naive(
        code_RC, pull_RC, hessian_CC, scale_R, level_RL, solved_BCC
    )
    assert float((moved_RC == twin_RC).double().mean()) > 0.99
    to_indices(moved_RC)
    scale_RP = scale_R[:, None] * torch.tensor([0.9, 1.0, 1.1])
    errors_RP = rounding_errors(weight_RC, scale_RP)
    assert torch.allclose(
        errors_RP, rounding_errors_naive(weight_RC, scale_RP), rtol=1e-4
    )


def problem(decay: float, spread: float = 0.0) -> tuple[Tensor, Factor, Tensor]:
    """Return Gaussian weights of 96 x 512, their factor, and H in float64.

    The eigenvalues of H fall from 1 to 10^-decay; rows grow by exp(spread N(0, 1)).
    """
    inputs = 512
    turn_II, _ = torch.linalg.qr(random(inputs, inputs, seed=1).double())
    value_I = 10 ** (-decay * torch.arange(inputs, dtype=torch.float64) / (inputs - 1))
    matrix_II = (turn_II * value_I) @ turn_II.T
    hessian = Hessian(inputs, 128, CPU)
    hessian.matrix_II.copy_(matrix_II.float())
    weight_OI = random(96, inputs) * torch.exp(spread * random(96, 1, seed=2))
    return weight_OI, factorise(hessian, 0.01, 128, Pool(1)), matrix_II


def solved(
    weight_OI: Tensor, factor: Factor, grid: LatticeGrid, *, sweeps: int, refit: bool
) -> Solution:
    options = {"dynamic_scales": True, "tile_rows": 128, "pool": Pool(1)}
    return solve(weight_OI, factor, grid, -1, sweeps=sweeps, refit=refit, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("decay", "spread", "loss"),
    [
        (0.0, 0.0, 0.0913),
        (1.5, 0.0, 0.0570),
        (3.0, 0.0, 0.0303),
        (1.5, 0.8, 0.0570),
    ],
)
def test_the_proxy_loss_is_no_worse_than_the_reference(
    decay: float, spread: float, loss: float
) -> None:
    weight_OI, factor, matrix_II = problem(decay, spread)
    grid = grid_of(LatticeGrid, torch.float32)
    # The reference sweeps ten times; three with our trials and refit do.
    made = solved(weight_OI, factor, grid, sweeps=3, refit=True)
    error_OI = weight_OI - grid.decode(made.code_OI, made.scale_OG, made.zero_OG)
    lost = ((error_OI.double() @ matrix_II) * error_OI).sum()
    whole = ((weight_OI.double() @ matrix_II) * weight_OI).sum()
    assert made.relative_error == pytest.approx(float(lost / whole), rel=1e-4)
    assert made.relative_error <= loss
    # A little more from the trials alone, and from nothing at all.
    plain = solved(
        weight_OI, factor, grid_of(OneScale, torch.float32), sweeps=0, refit=False
    )
    tried = solved(weight_OI, factor, grid, sweeps=0, refit=False)
    assert made.relative_error < tried.relative_error <= plain.relative_error * 1.0001


def textbook(
    weight_OI: Tensor, matrix_II: Tensor, scale_O: Tensor, sweeps: int
) -> Tensor:
    """Block LDL with every codeword looked at, in float64; gives the weights.

    ``matrix_II`` is damped. H = U D U^T with 8 x 8 identities on U's diagonal, found
    by eliminating blocks from the last; then, for each sweep, blocks move to the
    codeword nearest their minimiser where the loss falls.
    """
    inputs = weight_OI.shape[1]
    word_NC = codewords().double()

    def nearest(value_OC: Tensor) -> Tensor:
        value_OC = value_OC / scale_O[:, None]
        return word_NC[torch.cdist(value_OC, word_NC).argmin(1)] * scale_O[:, None]

    left_II, upper_II = matrix_II.clone(), torch.eye(inputs, dtype=torch.float64)
    for start in reversed(range(0, inputs, 8)):
        own = slice(start, start + 8)
        pivot_CC = left_II[own, own]
        upper_II[:start, own] = left_II[:start, own] @ torch.linalg.inv(pivot_CC)
        left_II[:start, :start] -= upper_II[:start, own] @ left_II[own, :start]
    made_OI = torch.zeros_like(weight_OI)
    for start in range(0, inputs, 8):
        own = slice(start, start + 8)
        error_OI = weight_OI[:, :start] - made_OI[:, :start]
        made_OI[:, own] = nearest(weight_OI[:, own] + error_OI @ upper_II[:start, own])
    for _ in range(sweeps):
        for start in range(0, inputs, 8):
            own = slice(start, start + 8)
            pull_OC = (weight_OI - made_OI) @ matrix_II[:, own]
            pivot_CC = matrix_II[own, own]
            moved_OC = nearest(made_OI[:, own] + pull_OC @ torch.linalg.inv(pivot_CC))
            step_OC = moved_OC - made_OI[:, own]
            gain_O = (step_OC * (2 * pull_OC - step_OC @ pivot_CC)).sum(1)
            made_OI[:, own] += torch.where(gain_O[:, None] > 0, step_OC, 0.0)
    return made_OI


@pytest.mark.parametrize("sweeps", [0, 2])
def test_the_solver_is_that_of_the_textbook(sweeps: int) -> None:
    inputs = 136  # tiles of 64, 64 and 8 columns
    mix_II = random(inputs, inputs, seed=7) / math.sqrt(inputs)
    hessian = Hessian(inputs, 64, CPU)
    hessian.add([(random(400, inputs) @ mix_II, torch.ones(400))], Pool(1))
    whole_II = hessian.matrix_II.triu() + hessian.matrix_II.triu(1).T
    damped_II = whole_II.double()
    damped_II.diagonal().add_(0.01 * damped_II.diagonal().mean())
    weight_OI = random(24, inputs, seed=8)
    factor = factorise(hessian, 0.01, 64, Pool(1))
    grid = grid_of(OneScale, torch.float32)
    made = solved(weight_OI, factor, grid, sweeps=sweeps, refit=False)
    back_OI = grid.decode(made.code_OI, made.scale_OG, made.zero_OG)
    wanted_OI = textbook(
        weight_OI.double(), damped_II, made.scale_OG[:, 0].double(), sweeps
    )
    same_OI = (back_OI - wanted_OI).abs() < 1e-5
    assert float(same_OI.double().mean()) > 0.99
    assert not made.kept_rounding
    to_indices(made.code_OI)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_no_row_gets_worse(storage: torch.dtype) -> None:
    weight_OI, factor, matrix_II = problem(2.0)
    weight_OI = weight_OI[:24]
    matrix_II = matrix_II + factor.damp * torch.eye(512, dtype=torch.float64)
    grid = grid_of(LatticeGrid, storage)

    def loss(sweeps: int, refit: bool) -> Tensor:
        made = solved(weight_OI, factor, grid, sweeps=sweeps, refit=refit)
        assert torch.equal(made.scale_OG, made.scale_OG.to(storage).float())
        error_OI = weight_OI - grid.decode(made.code_OI, made.scale_OG, made.zero_OG)
        return ((error_OI.double() @ matrix_II) * error_OI).sum(1)

    plain_O = loss(0, False)
    slack = 1 + 1e-6 if storage == torch.float32 else 1.01
    assert bool((loss(0, True) <= plain_O * slack).all())
    assert bool((loss(1, False) <= plain_O * slack).all())
    assert float(loss(2, True).sum()) < 0.96 * float(plain_O.sum())


def test_indices_are_looked_for_some_at_a_time(monkeypatch):
    """All at once they would take forty bytes a weight beside what is planned."""
    generator = torch.Generator().manual_seed(3)
    index_ON = torch.randint(1 << 16, (50, 4), generator=generator).to(torch.int32)
    sizes = []

    def seen(digit_OI):
        sizes.append(digit_OI.numel())
        return whole(digit_OI)

    whole = e8p_codebook._to_indices
    monkeypatch.setattr(e8p_codebook, "_to_indices", seen)
    monkeypatch.setattr(e8p_codebook, "_AT_A_TIME", 300)
    assert torch.equal(to_indices(to_digits(index_ON)), index_ON)
    assert max(sizes) <= 300
    assert sum(sizes) == 50 * 32
