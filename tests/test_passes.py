"""A pass has no more in memory than what is in flight, and leaves nothing behind."""

import weakref
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rsq_stream.algorithm.factor import factorise
from rsq_stream.passes import flat
from tests.toy import run_toy, toy_checkpoint

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

    monkeypatch.setattr("rsq_stream.stage_statistics.flat", watched)
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

    monkeypatch.setattr("rsq_stream.block_solver.factorise", factorised)
    monkeypatch.setattr(
        "rsq_stream.block_solver.give_back_free_memory",
        lambda: called.append("given back"),
    )
    run_toy(toy, tmp_path / "out", **RUN)
    assert called == 2 * 4 * ["given back", "factorise"]
