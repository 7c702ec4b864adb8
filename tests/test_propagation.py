"""Targets that make up for earlier layers' error: the formula, and what it means."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.factor import factorise
from rsq_stream.algorithm.hessian import Hessian
from rsq_stream.algorithm.propagation import Drift, stream_error
from rsq_stream.ops.pool import Pool, single_threaded_products
from tests.textbook_solver import propagated

SIZES = [(1, 1, 1), (63, 5, 137), (200, 96, 40), (137, 63, 63)]
"""Tokens, outputs, inputs."""


@pytest.fixture(params=[1, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with single_threaded_products(request.param) as made:
        yield made


def made(tokens: int, outputs: int, inputs: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(tokens + outputs + inputs)
    u_TI = torch.randn(tokens, inputs, generator=random)
    return {
        "weight_OI": torch.randn(outputs, inputs, generator=random),
        "u_TI": u_TI,
        "full_TI": u_TI + 0.3 * torch.randn(tokens, inputs, generator=random),
        "r_TO": torch.randn(tokens, outputs, generator=random),
        "full_r_TO": torch.randn(tokens, outputs, generator=random),
        "weight_T": torch.rand(tokens, generator=random).bfloat16().float() + 0.25,
    }


def ours(
    given: dict[str, Tensor], pool: Pool, *, shared: bool, share: float, damping: float
) -> Tensor:
    """Give W' from two units of tokens."""
    outputs, inputs = given["weight_OI"].shape
    hessian = Hessian(inputs, 32, torch.device("cpu"))
    drift = Drift(None if shared else outputs, inputs, 32, torch.device("cpu"))
    half = len(given["u_TI"]) // 2
    for unit in (slice(0, half), slice(half, None)):
        u_TI, weight_T = given["u_TI"][unit], given["weight_T"][unit]
        error = stream_error(given["full_TI"][unit], u_TI, weight_T)
        if not shared:
            error = error @ given["weight_OI"].T
            error += stream_error(
                given["full_r_TO"][unit], given["r_TO"][unit], weight_T
            )
        hessian.add([(u_TI, weight_T)], pool)
        drift.add([(error, u_TI)], pool)
    factor = factorise(hessian, damping, 32, pool)
    weight_OI = given["weight_OI"]
    return weight_OI + drift.correction(weight_OI, factor, share, 32, pool)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "T{}-O{}-I{}".format(*s))
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_targets_are_those_of_the_formula(
    size: tuple[int, int, int], share: float, shared: bool, pool: Pool
) -> None:
    given = made(*size)
    found = ours(given, pool, shared=shared, share=share, damping=0.01)
    wanted = propagated(
        given["weight_OI"],
        given["weight_T"][None],
        (given["u_TI"][None], given["full_TI"][None]),
        None if shared else (given["r_TO"][None], given["full_r_TO"][None]),
        share=share,
        damping=0.01,
    )
    error = (found - wanted).norm() / wanted.norm()
    assert float(error) < 1e-5


def test_the_whole_correction_is_the_least_squares_answer(pool: Pool) -> None:
    given = made(400, 7, 43)
    found = ours(given, pool, shared=False, share=1.0, damping=1e-7)
    root_T1 = given["weight_T"].double().sqrt()[:, None]
    wanted_TO = given["full_TI"].double() @ given["weight_OI"].double().T
    wanted_TO += given["full_r_TO"].double() - given["r_TO"].double()
    best = torch.linalg.lstsq(
        root_T1 * given["u_TI"].double(), root_T1 * wanted_TO
    ).solution.T
    assert float((found - best).norm() / best.norm()) < 1e-5


def test_streams_that_agree_change_nothing(pool: Pool) -> None:
    given = made(137, 9, 40)
    given |= {"full_TI": given["u_TI"], "full_r_TO": given["r_TO"]}
    for shared in (True, False):
        found = ours(given, pool, shared=shared, share=1.0, damping=0.01)
        assert torch.equal(found, given["weight_OI"])


@pytest.mark.parametrize("shared", [True, False])
def test_workers_change_no_bit(shared: bool) -> None:
    given = made(63, 96, 172)
    found = []
    for workers in (1, 2, 4):
        with single_threaded_products(workers) as pool:
            found.append(ours(given, pool, shared=shared, share=0.5, damping=0.01))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
