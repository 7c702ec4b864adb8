"""A GPU whose memory runs out in a pass: fewer units in flight, and the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.errors import BudgetError
from rsq_stream.events import Notice
from rsq_stream.model.block import Block
from rsq_stream.pipeline import block_solver
from tests.support.toy import Recorder, contents, run_toy, toy_checkpoint

RUN: dict[str, Any] = {
    "method": "rsq",
    "propagate": 0.5,
    "execution": {"in_flight": 4, "resident_units": 1},
}


class Scarce:
    """Memory that runs out at some of the calls of a function."""

    def __init__(self, function: Callable[..., Any], at: set[int]) -> None:
        self._function, self._at, self._calls = function, at, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self._calls += 1
        if self._calls in self._at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._function(*given, **named)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(
        tmp_path_factory.mktemp("scarce") / "toy", blocks=1, straddle=False
    )


@pytest.fixture(scope="module")
def whole(toy: Path) -> dict[str, bytes]:
    output = toy.with_name("whole")
    run_toy(toy, output, **RUN)
    return contents(output)


@pytest.mark.parametrize(
    ("where", "name", "at", "left"),
    [
        (Block, "attention_output", {3}, [2]),  # in attention out, some units done
        (Block, "mlp_output", {2, 3}, [2, 1]),  # in mlp out, and again
        (Block, "after_attention", {4}, [2]),  # h is half written
        (Block, "after_mlp", {2, 8}, [2, 1]),  # outputs, of both streams
        (Hessian, "add", {1}, [2]),  # after the units of a batch
    ],
)
def test_fewer_units_and_the_same_bytes(
    toy: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: type,
    name: str,
    at: set[int],
    left: list[int],
) -> None:
    scarce, heard = Scarce(getattr(where, name), at), Recorder()
    monkeypatch.setattr(where, name, lambda *given: scarce(*given))
    run_toy(toy, tmp_path / "out", listener=heard, **RUN)
    texts = [event.text for event in heard.events if isinstance(event, Notice)]
    said = [text for text in texts if "memory ran out" in text]
    assert [text.partition("; ")[2] for text in said] == [
        f"{units} units in flight from now" for units in left
    ]
    assert all(text.startswith("block ") for text in said)
    assert contents(tmp_path / "out") == whole


def test_not_even_one(
    toy: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        scarce = Scarce(Block.mlp_output, set(range(1, 100)))
        patch.setattr(Block, "mlp_output", lambda *given: scarce(*given))
        says = "block 0, mlp out: memory ran out with one unit in flight; free some"
        with pytest.raises(BudgetError, match=says):
            run_toy(toy, output, **RUN)
    summary = run_toy(toy, output, **RUN)
    assert contents(output) == whole
    assert summary.resumed_at == 0


@pytest.mark.parametrize(
    ("name", "stage"), [("factorise", "attention out"), ("solve", "mlp in")]
)
def test_out_of_memory_outside_a_pass(
    toy: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stage: str,
) -> None:
    """There is nothing to halve: one line, and the same command goes on."""
    at = {"factorise": 2, "solve": 5}[name]
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        scarce = Scarce(getattr(block_solver, name), {at})
        patch.setattr(block_solver, name, scarce)
        says = f"^block 0, {stage}: memory ran out while a linear was solved; free some"
        with pytest.raises(BudgetError, match=says):
            run_toy(toy, output, **RUN)
    run_toy(toy, output, **RUN)
    assert contents(output) == whole
