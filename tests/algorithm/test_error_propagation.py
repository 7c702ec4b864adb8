"""Targets that make up for earlier layers' error: the formula, and what it means."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.error_propagation import CrossTerm, stream_error
from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import factorise
from rsq_stream.errors import UsageError
from rsq_stream.runtime.worker_pool import Pool, single_threaded_products
from tests.pipeline.test_resume import RUN, SMALL
from tests.support.textbook_solver import propagated
from tests.support.toy import (
    decoded_state,
    linear_names,
    plan_toy,
    run_toy,
    toy_checkpoint,
)

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
    """Return W' from two units of tokens."""
    outputs, inputs = given["weight_OI"].shape
    hessian = Hessian(inputs, 32, torch.device("cpu"))
    cross_term = CrossTerm(None if shared else outputs, inputs, 32, torch.device("cpu"))
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
        cross_term.add([(error, u_TI)], pool)
    factor = factorise(hessian, damping, 32, pool)
    weight_OI = given["weight_OI"]
    parts = [slice(start, start + 32) for start in range(0, outputs, 32)]
    moved = [cross_term.correction(weight_OI[r], r, factor, share) for r in parts]
    return weight_OI + torch.cat(moved)


def budget(given: dict[str, Tensor], *, damping: float) -> float:
    """Bound the relative error of a solve in fp32 by the condition of H + lambda I.

    63 tokens of 137 inputs leave H singular but for its damping: there, fp32 keeps 4 of
    its 7 digits, and which of two processors errs by more is chance.
    """
    u_TI = given["u_TI"].double()
    hessian_II = (given["weight_T"].double()[:, None] * u_TI).T @ u_TI
    hessian_II.diagonal().add_(damping * hessian_II.diagonal().mean())
    unit_roundoff = torch.finfo(torch.float32).eps / 2
    return unit_roundoff * float(torch.linalg.cond(hessian_II))


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
    assert float(error) < budget(given, damping=0.01)


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


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("shares") / "toy", **SMALL)


def state(toy: Path, output: Path, **settings: Any) -> dict[str, Tensor]:
    run_toy(toy, output, **RUN | settings)
    return decoded_state(output)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Name the linears that two outputs have in common."""
    weights = [(name, f"{name}.weight") for name in linear_names(2)]
    return [name for name, key in weights if torch.equal(one[key], other[key])]


def test_a_share_for_all_is_the_share(toy: Path, tmp_path: Path) -> None:
    once = state(toy, tmp_path / "one", propagate=0.5)
    own = {"propagate": 0.0, "propagate_overrides": ("*=0.5",)}
    assert same(once, state(toy, tmp_path / "own", **own)) == linear_names(2)
    none = {"propagate": 0.5, "propagate_overrides": ("*=0",)}
    alone = state(toy, tmp_path / "alone", propagate=0.0)
    assert same(alone, state(toy, tmp_path / "none", **none)) == linear_names(2)
    # Before the first solved linear there is nothing to make up for.
    assert same(once, alone) == linear_names(2)[:3]


def test_shares_by_role_and_depth(toy: Path, tmp_path: Path) -> None:
    once = state(toy, tmp_path / "one", propagate=0.5)
    own = {"propagate": 0.5, "propagate_overrides": ("down_proj@1=0.25",)}
    other = state(toy, tmp_path / "own", **own)
    assert same(once, other) == linear_names(2)[:-1]


def test_without_the_residual_only_down_and_what_follows_change(
    toy: Path, tmp_path: Path
) -> None:
    once = state(toy, tmp_path / "one", propagate=0.5)
    other = state(toy, tmp_path / "own", propagate=0.5, residual_correction=False)
    # The first residual, that of block 0's o, has no error yet.
    assert same(once, other) == linear_names(2)[:6]


@pytest.mark.parametrize("line", ["x", "=0.5", "o_proj=1.5", "o_proj=-1", "o_proj=nan"])
def test_shares_are_bounded(toy: Path, line: str) -> None:
    with pytest.raises(UsageError, match=r"--propagate-override must be PATTERN=A"):
        plan_toy(toy, propagate_overrides=(line,))


def test_a_share_for_nothing_is_a_typo(toy: Path) -> None:
    with pytest.raises(UsageError, match=r"--propagate-override up=0.0: no linear"):
        plan_toy(toy, propagate_overrides=("up=0",))
