"""The largest linear first, with random data: what fails for memory fails at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rsq_stream.errors import BudgetError
from rsq_stream.events import Notice, RunStarted
from rsq_stream.pipeline import preflight
from tests.support.toy import (
    Recorder,
    contents,
    execution_for,
    options_for,
    plan_toy,
    run_toy,
    toy_checkpoint,
)

TRIED: dict[str, Any] = {"execution": {"solves_largest_first": True}}
SAID = "trying the largest linear first: down, 172 inputs"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trial") / "toy"
    return toy_checkpoint(folder, blocks=1, straddle=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"propagate": 0.0},
        {"propagate": 0.5, "sweeps": 1, "refit": True},
        {"act_order": True, "group_scales": "static"},
    ],
    ids=["one stream", "two streams", "act order"],
)
def test_it_changes_no_byte(
    toy: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    for name, changed in (("with", TRIED), ("without", {})):
        heard = Recorder()
        run_toy(
            toy, tmp_path / name, method="rsq", listener=heard, **settings, **changed
        )
        notices = [made.text for made in heard.events if isinstance(made, Notice)]
        assert (SAID in notices) == (name == "with")
        if SAID in notices:
            kinds = [type(made) for made in heard.events]
            said = heard.events.index(Notice(text=SAID))
            assert said < kinds.index(RunStarted)
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_it_fails_before_the_run(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(preflight, "factorise", full)
    says = r"memory ran out while the largest linear \(down, 172 inputs\) was solved"
    heard = Recorder()
    with pytest.raises(BudgetError, match=says):
        run_toy(toy, tmp_path / "out", method="rsq", listener=heard, **TRIED)
    assert not any(isinstance(made, RunStarted) for made in heard.events)


def test_another_error_stays_what_it_is(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(preflight, "factorise", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run_toy(toy, tmp_path / "out", method="rsq", **TRIED)


def test_who_tries(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = plan_toy(toy, method="rsq")
    output, budget = tmp_path / "out", 64 << 30
    stated, open_ended = (
        options_for(output, ram_bytes=ram_bytes) for ram_bytes in (budget, None)
    )
    assert not execution_for(toy, plan, stated).solves_largest_first
    monkeypatch.setattr("rsq_stream.pipeline.preflight.LEAST_INPUTS", 172)
    assert execution_for(toy, plan, stated).solves_largest_first
    assert not execution_for(toy, plan, open_ended).solves_largest_first


def test_what_is_kept_is_not_tried(toy: Path, tmp_path: Path) -> None:
    heard = Recorder()
    run_toy(
        toy,
        tmp_path / "out",
        method="rsq",
        overrides=("down_proj=16",),
        listener=heard,
        **TRIED,
    )
    texts = [made.text for made in heard.events if isinstance(made, Notice)]
    assert "trying the largest linear first: q, 96 inputs" in texts
