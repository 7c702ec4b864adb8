"""Each kernel, from its own source, agrees with its twin; on the CPU through g++."""

import math
from collections.abc import Iterator

import pytest
import torch
from rsq_stream.cli.doctor import kernels

from rsq_stream.algorithm.rotation.hadamard import (
    factors_of,
    hadamard_product,
    kronecker_factors,
    paley,
    sylvester,
)
from rsq_stream.errors import KernelError
from rsq_stream.ops import (
    clip_search,
    column_sums,
    column_sweep,
    descent,
    e8p,
    hadamard,
    pack,
    table,
    two_terms,
)
from rsq_stream.ops.e8p_codebook import digit_values
from rsq_stream.ops.pack import pack_naive, unpack_naive
from tests.ops.test_clip_search import candidates, errors_of
from tests.ops.test_clip_search import random as rows_of
from tests.ops.test_column_sums import SCALING, eager_map, random_heads, worst
from tests.ops.test_column_sweep import problem
from tests.support import host_kernels

pytestmark = pytest.mark.skipif(
    host_kernels.compiler() is None, reason="needs g++, which is absent"
)
FACES = (
    pack,
    clip_search,
    column_sums,
    descent,
    hadamard,
    e8p,
    column_sweep,
    two_terms,
)
each_size = pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 63), (3, 137), (6, 172)]
)


@pytest.fixture(autouse=True)
def on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put g++ in the place of the driver; outputs begin poisoned, between guards."""
    for face in FACES:
        monkeypatch.setattr(face, "launch", host_kernels.launch)
        monkeypatch.setattr(face, "output", host_kernels.output)
    yield
    host_kernels.require_guards()


@each_size
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("zero", ["symmetric", "zero-points"])
def test_sweep_is_its_twin(rows, columns, bits, zero):
    given = problem(rows, columns, bits, zero)
    found, twin = column_sweep.sweep_kernel(*given), column_sweep.sweep_naive(*given)
    assert all(torch.equal(a, b) for a, b in zip(found, twin, strict=True))


@each_size
@pytest.mark.parametrize("bits", [2, 4])
def test_descent_is_its_twin(rows, columns, bits):
    given = problem(rows, columns, bits, "symmetric")
    generator = torch.Generator().manual_seed(columns)
    root_CC = torch.randn(columns, columns + 9, generator=generator)
    hessian_CC = root_CC @ root_CC.T / columns
    code_RC = torch.randint(2**bits, (rows, columns), generator=generator)
    code_RC = code_RC.to(torch.uint8)
    rest = (given.target_RC, hessian_CC, given.scale_R, given.zero_R, given.level_RL)
    found_RC = descent.descend_kernel(code_RC, *rest)
    assert torch.equal(found_RC, descent.descend(code_RC, *rest))
    same = found_RC == descent.descend_naive(code_RC, *rest)
    assert float(same.double().mean()) >= 0.999


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 63), (6, 137)])
@pytest.mark.parametrize("kind", ["mirrored", "upright", "zero"])
@pytest.mark.parametrize("exponent", [2.0, 2.4])
def test_clip_search_chooses_as_its_twin(rows, columns, kind, exponent):
    target_RC, mirrored = rows_of(rows, columns), kind == "mirrored"
    scale_RP, zero_R = candidates(target_RC, 3, kind)
    given = (target_RC, scale_RP, zero_R, 7, exponent, mirrored)
    found_R = clip_search.best_scale_kernel(*given)
    signed_RP = torch.cat([scale_RP, -scale_RP], 1) if mirrored else scale_RP
    error_RP = errors_of(target_RC, signed_RP, zero_R, 7, exponent)
    place_R = torch.where(found_R < 0, scale_RP.shape[1] - 1 - found_R, found_R)
    chosen_R = error_RP.gather(1, place_R[:, None])[:, 0]
    assert bool((chosen_R <= error_RP.amin(1) * (1 + 1e-5)).all())
    if exponent == 2.0:
        assert torch.equal(found_R, clip_search.best_scale(*given))


@pytest.mark.parametrize("bits", [2, 4])
def test_tables_have_kernels_that_are_their_twins(bits):
    given = problem(6, 137, bits, "symmetric")
    value_L = torch.linspace(-1, 1, 2**bits).pow(3)
    middle_M = table.middles(value_L)
    level_RL = value_L * given.scale_R[:, None]
    scales = (given.scale_R, given.zero_R, level_RL, middle_M)
    found = column_sweep.sweep_kernel(*given[:3], *scales)
    twin = table.sweep_table(*given[:4], value_L, level_RL)
    assert all(torch.equal(a, b) for a, b in zip(found, twin, strict=True))
    hessian_CC = torch.eye(137) + 0.1 * torch.ones(137, 137)
    moved = (found[0], given.target_RC / 9, hessian_CC)
    better_RC = descent.descend_kernel(*moved, *scales)
    twin_RC = table.descend_table(*moved, given.scale_R, value_L, level_RL)
    assert torch.equal(better_RC, twin_RC)
    assert not torch.equal(better_RC, found[0])
    widest_R1 = given.weight_RC.abs().amax(1, keepdim=True)
    scale_RP = widest_R1 * torch.linspace(1, 0.2, 80)
    for mirrored in (False, True):
        searched = (given.weight_RC, scale_RP, given.zero_R, 2**bits - 1)
        best_R = clip_search.best_scale_kernel(
            *searched, 2.0, mirrored, (value_L, middle_M)
        )
        twin_R = table.best_table_scale(*searched[:2], value_L, 2.0, mirrored)
        assert torch.equal(best_R, twin_R)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (63, 8), (5, 136), (137, 64)])
@pytest.mark.parametrize("spread", [0.2, 1.0, 5.0])
def test_lattice_finds_the_codewords_of_its_twin(rows, columns, spread):
    generator = torch.Generator().manual_seed(rows * columns)
    wide_RC = spread * torch.randn(rows, columns + 3, generator=generator)
    target_RC = wide_RC[:, :columns]
    scale_R = torch.rand(rows, generator=generator) + 0.5
    found_RC = e8p.round_lattice_kernel(target_RC, scale_R)
    assert torch.equal(found_RC, e8p.round_lattice(target_RC, scale_R))


def test_lattice_blocks_by_the_kernel_are_those_of_the_loops():
    given = problem(5, 136, 2, "symmetric")
    scale_R = given.scale_R.abs()
    level_RL = digit_values() * scale_R[:, None]
    upper_CC = given.upper_CC.triu(1)
    rest = (given.weight_RC, upper_CC, scale_R, level_RL)
    digit_RC, *_ = e8p.sweep_lattice_naive(
        given.target_RC,
        *rest,
        e8p._unit_inverses(upper_CC),
        e8p.round_lattice_kernel,
    )
    twin_RC, *_ = e8p.sweep_lattice(given.target_RC, *rest)
    assert float((digit_RC == twin_RC).double().mean()) >= 0.98


def test_clip_search_breaks_ties_as_its_twin():
    scale_RP = torch.tensor([[4.0, 1.0, 1.0, 0.5]]).repeat(4, 1)
    rows = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-2.0, 1.0], [2.0, -1.0]])
    given = (rows, scale_RP, torch.full((4,), 2.0), 3, 2.0, True)
    assert clip_search.best_scale_kernel(*given).tolist() == [0, 1, 1, -2]


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"),
    [(1, 1, 1, 1), (63, 6, 2, 26), (137, 2, 2, 16), (172, 3, 1, 63)],
)
@pytest.mark.parametrize("window", [None, 1, 20, 63, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sums_keep_to_the_budget(tokens, heads, kv_heads, width, window, dtype):
    made = random_heads(tokens, heads, kv_heads, width, dtype)
    exact_BT = eager_map(made, window, torch.float64).sum((1, 2))
    naive_BT = eager_map(made, window, torch.float32).sum((1, 2))
    query, key = made.query_BHTK, made.key_BGTK
    found_BT = column_sums.column_sums_kernel(query, key, SCALING, window)
    budget = 2 * worst(naive_BT - exact_BT) + 1e-6 * worst(exact_BT)
    assert worst(found_BT - exact_BT) <= budget


@pytest.mark.parametrize("width", [20, 64, 128, 250])
def test_column_sums_of_wide_heads_keep_to_the_budget(width):
    made = random_heads(300, 2, 1, width, torch.bfloat16)
    exact_BT = eager_map(made, None, torch.float64).sum((1, 2))
    naive_BT = eager_map(made, None, torch.float32).sum((1, 2))
    found_BT = column_sums.column_sums_kernel(made.query_BHTK, made.key_BGTK, SCALING)
    budget = 2 * worst(naive_BT - exact_BT) + 1e-6 * worst(exact_BT)
    assert worst(found_BT - exact_BT) <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 100.0])
def test_no_mass_is_lost(factor, dtype):
    made = random_heads(137, 2, 1, 26, dtype)
    query, key = factor * made.query_BHTK, factor * made.key_BGTK
    total_B = column_sums.column_sums_kernel(query, key, SCALING).double().sum(1)
    expected_B = torch.full_like(total_B, 2 * 137)
    torch.testing.assert_close(total_B, expected_B, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("codes", [1, 32, 48, 63, 137, 160, 172])
def test_packing_is_its_twin(codes, bits):
    generator = torch.Generator().manual_seed(codes)
    code_OI = torch.randint(2**bits, (5, codes), generator=generator).to(torch.uint8)
    word_OW = pack.pack_kernel(code_OI, bits)
    assert torch.equal(word_OW, pack_naive(code_OI, bits))
    assert torch.equal(pack.unpack_kernel(word_OW, bits, codes), code_OI)
    assert torch.equal(unpack_naive(word_OW, bits, codes), code_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 8, 63, 64, 137, 172])
def test_two_terms_are_their_twins(columns, dtype):
    generator = torch.Generator().manual_seed(columns)
    # Of a wider matrix: rows begin at multiples of 16 bytes, or they do not.
    wide_TC = torch.randn(5, columns + columns % 8, generator=generator).to(dtype)
    weight_T = torch.rand(5, generator=generator).bfloat16().float()
    for x_TC in (wide_TC[:, :columns], wide_TC[:, columns // 2 :]):
        x_TC[2, -1] = float("nan")
        for weights in (None, weight_T):
            found = two_terms.two_terms_kernel(x_TC, weights)
            twin = two_terms.two_terms_naive(x_TC, torch.bfloat16, weights)
            assert (found.unit, twin.unit) == (1, 1)
            for one, other in zip(found[:2], twin[:2], strict=True):
                fine = ~other.isnan()
                assert torch.equal(one.isnan(), other.isnan())
                assert torch.equal(one[fine], other[fine])


@pytest.mark.parametrize(
    ("rows", "order", "runs", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (3, 2, 63, torch.float32),
        (5, 12, 1, torch.float32),
        (3, 20, 2, torch.bfloat16),
        (2, 64, 3, torch.float32),
        (17, 128, 1, torch.bfloat16),
        (3, 512, 1, torch.float32),
        (2, 1536, 1, torch.bfloat16),
        (1, 3584, 1, torch.float32),
    ],
)
def test_hadamard_keeps_to_the_budget(rows, order, runs, dtype):
    generator = torch.Generator().manual_seed(order)
    x_LN = torch.randn(rows, order * runs, generator=generator).to(dtype)
    dense = torch.ones(1, 1, dtype=torch.float64)
    for factor in kronecker_factors(order):
        dense = torch.kron(dense, factor.double())
    dense /= math.sqrt(order)
    exact_LN = (x_LN.double().reshape(-1, order) @ dense).reshape(x_LN.shape)
    naive_LN = (x_LN.float().reshape(-1, order) @ dense.float()).to(dtype)
    split = factors_of(order)
    assert split is not None
    small = sylvester(1) if split[0] == 1 else paley(split[0])
    assert small is not None
    found_LN = hadamard.hadamard_kernel(x_LN, small, split[1])
    assert found_LN.dtype == dtype
    naive = (naive_LN.reshape(x_LN.shape).double() - exact_LN).square().mean().sqrt()
    found = (found_LN.double() - exact_LN).square().mean().sqrt()
    assert float(found) <= 2 * float(naive) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "order"), [(43, 192), (17, 512), (3, 4096), (2, 14336), (1, 49152)]
)
def test_hadamard_of_many_chunks_keeps_to_the_budget(rows, order, dtype):
    """Short last chunks, columns of several parts, more warps, odd addresses."""
    generator = torch.Generator().manual_seed(order)
    whole = torch.randn(rows * order + 3, generator=generator).to(dtype)
    split = factors_of(order)
    assert split is not None
    small = sylvester(1) if split[0] == 1 else paley(split[0])
    assert small is not None
    for x_LN in (whole[:-3].view(rows, order), whole[3:].view(rows, order)):
        exact_LN = hadamard_product(x_LN.double(), order)
        naive_LN = hadamard_product(x_LN.float(), order).to(dtype)
        found_LN = hadamard.hadamard_kernel(x_LN, small, split[1])
        naive = (naive_LN.double() - exact_LN).square().mean().sqrt()
        found = (found_LN.double() - exact_LN).square().mean().sqrt()
        assert float(found) <= 2 * float(naive) + 1e-7


def test_factors_of_one_order_have_a_kernel_each():
    x_LN = torch.randn(3, 24, generator=torch.Generator().manual_seed(24))
    small = paley(12)
    assert small is not None
    found_LN = hadamard.hadamard_kernel(x_LN, small, 2)
    assert torch.equal(hadamard.hadamard_kernel(x_LN, -small, 2), -found_LN)


def test_bf16_is_rounded_to_the_nearest_even():
    x_LN = torch.tensor([[1.0, 2**-8], [1.0, 3 * 2**-8], [-3.0, 2**-9]]).bfloat16()
    found_LN = hadamard.hadamard_kernel(x_LN, sylvester(1), 2)
    root = torch.tensor(2.0).rsqrt()
    sums = torch.stack(
        [x_LN[:, 0].float() + x_LN[:, 1], x_LN[:, 0].float() - x_LN[:, 1]]
    )
    assert torch.equal(found_LN, (sums.T * root).bfloat16())


def test_what_a_kernel_does_not_take_is_refused():
    given = problem(2, 257, 3, "symmetric")
    with pytest.raises(KernelError, match="sweep: 1 to 256 columns at a time, not 257"):
        column_sweep.sweep_kernel(*given)
    query = torch.zeros(1, 65536, 1, 1)
    with pytest.raises(KernelError, match=r"column_sums.* is beyond"):
        column_sums.column_sums_kernel(query, query[:, :1], SCALING)


def test_doctor_compares_what_kernels_give(monkeypatch):
    """On the CPU kernel and twin agree; a result that is off must be found."""
    checks = kernels.kernel_checks("cpu")
    for check in checks:
        check.require()
    equal, budget = kernels._equal, kernels._budget
    monkeypatch.setattr(
        kernels, "_equal", lambda what, found, twin: equal(what, found + 1, twin)
    )
    monkeypatch.setattr(
        kernels, "_budget", lambda found, *rest: budget(found * 1.001, *rest)
    )
    for check in checks:
        with pytest.raises(ArithmeticError):
            check.require()
