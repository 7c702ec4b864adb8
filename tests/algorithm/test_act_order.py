"""Act-order: heavy columns first, groups whole, everything back in its place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsq_stream.algorithm.gptq.act_order import group_aware_order, put_back, reorder
from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import factorise
from rsq_stream.algorithm.gptq.solver import solve
from rsq_stream.algorithm.grids.integer import IntegerGrid, decode
from rsq_stream.runtime.worker_pool import Pool
from tests.support.textbook_solver import gptq

GRID = IntegerGrid(
    bits=3,
    symmetric=True,
    signed_scales=True,
    clip_steps=80,
    storage_type=torch.float32,
)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**32), st.booleans())
def test_groups_stay_whole_and_heavy_ones_come_first(
    groups: int, size: int, seed: int, ties: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    diagonal_I = torch.rand(groups * size, generator=random)
    if ties:
        diagonal_I = (3 * diagonal_I).round()
    order_I = group_aware_order(diagonal_I, size)
    assert sorted(order_I.tolist()) == list(range(groups * size))
    group_GC = order_I.reshape(groups, size) // size
    assert (group_GC == group_GC[:, :1]).all()
    sorted_GC = diagonal_I[order_I].reshape(groups, size)
    assert (sorted_GC[:, 1:] <= sorted_GC[:, :-1]).all()
    assert (sorted_GC[1:, 0] <= sorted_GC[:-1, 0]).all()
    whole_I = group_aware_order(diagonal_I, -1)
    assert (diagonal_I[whole_I].diff() <= 0).all()


@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(5, 137, -1), (40, 96, 32), (63, 256, 64)]
)
def test_it_is_the_textbook_on_permuted_columns(
    outputs: int, inputs: int, group: int
) -> None:
    random = torch.Generator().manual_seed(inputs)
    x_TI = torch.randn(3 * inputs, inputs, generator=random)
    x_TI *= torch.rand(inputs, generator=random) ** 3 + 0.1
    weight_OI = torch.randn(outputs, inputs, generator=random)
    hessian = Hessian(inputs, 32, torch.device("cpu"))
    hessian.add([(x_TI, torch.ones(len(x_TI)))], Pool(1))
    whole_II = (hessian.matrix_II.triu() + hessian.matrix_II.triu(1).T).double()
    order_I = group_aware_order(hessian.matrix_II.diagonal(), group)
    reorder(hessian, order_I)
    permuted_II = whole_II[order_I][:, order_I]
    assert torch.equal(hessian.matrix_II.triu().double(), permuted_II.triu())
    factor = factorise(hessian, 0.01, 32, Pool(1))
    found = solve(
        weight_OI[:, order_I],
        factor,
        GRID,
        group,
        dynamic_scales=True,
        tile_rows=32,
        pool=Pool(1),
    )
    wanted = gptq(weight_OI[:, order_I], permuted_II, 3, group)
    assert float((found.code_OI == wanted.codes_OI).double().mean()) >= 0.999
    back = put_back(found, order_I)
    decoded_OI = decode(back.code_OI, back.scale_OG, back.zero_OG, torch.float32)
    there_OI = decode(found.code_OI, found.scale_OG, found.zero_OG, torch.float32)
    assert torch.equal(decoded_OI[:, order_I], there_OI)
    error_OI = (weight_OI - decoded_OI).double()
    share = (error_OI @ whole_II * error_OI).sum() / (
        weight_OI.double() @ whole_II * weight_OI
    ).sum()
    assert float(share) == pytest.approx(found.relative_error, rel=1e-4)


def test_heavy_inputs_lose_less_in_this_order() -> None:
    """Inputs of very different weight are what the order is for."""
    random = torch.Generator().manual_seed(0)
    scale_I = torch.logspace(-2, 1, 128)[torch.randperm(128, generator=random)]
    mix_II = torch.randn(128, 128, generator=random) / 11
    x_TI = torch.randn(600, 128, generator=random) @ mix_II * scale_I
    weight_OI = torch.randn(64, 128, generator=random)
    errors = []
    for ordered in (False, True):
        hessian = Hessian(128, 32, torch.device("cpu"))
        hessian.add([(x_TI, torch.ones(len(x_TI)))], Pool(1))
        target_OI = weight_OI
        if ordered:
            order_I = group_aware_order(hessian.matrix_II.diagonal(), -1)
            reorder(hessian, order_I)
            target_OI = weight_OI[:, order_I]
        factor = factorise(hessian, 0.01, 32, Pool(1))
        settings = {"dynamic_scales": True, "tile_rows": 32, "pool": Pool(1)}
        errors.append(solve(target_OI, factor, GRID, -1, **settings).relative_error)  # type: ignore[arg-type]
    assert errors[1] < 0.9 * errors[0]
