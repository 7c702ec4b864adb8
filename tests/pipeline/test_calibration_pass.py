"""A pass has no more in memory than what is in flight, and leaves nothing behind."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import flat
from rsq_stream.algorithm.gptq.ldl import factorise
from rsq_stream.checkpoint.model_reader import ModelReader
from tests.support.toy import LINEARS, open_toy, run_toy, toy_checkpoint

IN_FLIGHT = 2
RUN: dict[str, Any] = {
    "method": "gptq",
    "samples": 8,
    "plan": {"unit_sequences": 1},
    "execution": {"in_flight": IN_FLIGHT},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("passes") / "toy", blocks=2)


def test_a_run_of_units_is_gone_when_the_next_is_made(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    most = [0]

    def watched(x_BTI: Tensor) -> Tensor:
        x_TI = flat(x_BTI)
        made.append(weakref.ref(x_TI))
        most[0] = max(most[0], sum(found() is not None for found in made))
        return x_TI

    monkeypatch.setattr("rsq_stream.pipeline.stage_statistics.flat", watched)
    run_toy(toy, tmp_path / "out", **RUN)
    assert len(made) == 2 * 4 * 8
    assert most[0] == IN_FLIGHT


def test_what_a_pass_took_is_given_back_before_the_solver_takes_its_own(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def factorised(*given: Any) -> Any:
        called.append("factorise")
        return factorise(*given)

    monkeypatch.setattr("rsq_stream.pipeline.block_solver.factorise", factorised)
    monkeypatch.setattr(
        "rsq_stream.pipeline.block_solver.trim_heap",
        lambda: called.append("given back"),
    )
    run_toy(toy, tmp_path / "out", **RUN)
    assert called == 2 * 4 * ["given back", "factorise"]


def test_a_block_is_gone_once_nobody_has_it(toy: Path) -> None:
    """At once: circles are found late, and hold the weights of block after block."""
    reader = ModelReader(open_toy(toy), torch.device("cpu"))
    rope = reader.rope(8)
    gc.collect()
    gc.disable()
    try:
        block = reader.block(0, rope)
        block.forward(torch.zeros(1, 8, 96))
        held = [weakref.ref(block.weight(linear)) for linear in LINEARS]
        del block
        assert all(found() is None for found in held)
    finally:
        gc.enable()


def test_a_run_leaves_no_weights_behind(toy: Path, tmp_path: Path) -> None:
    """Nothing that a block of a run was made of waits for the collector either."""
    gc.collect()
    gc.disable()
    try:
        run_toy(toy, tmp_path / "out", **RUN)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [made for made in gc.garbage if isinstance(made, Tensor)]
        assert not any(made.shape == (96, 172) for made in left)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
