"""A grid is one file: one that a test registers runs as those of the package do."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids._table import TableGrid
from rsq_stream.errors import UsageError, one_of
from rsq_stream.output.verify import verify
from tests.pipeline.test_repair import RUN, stopped
from tests.support.entries import grid_settings
from tests.support.toy import (
    calm,
    contents,
    decoded_state,
    linear_names,
    open_toy,
    read_json,
    run_toy,
    toy_checkpoint,
)


class Ternary(TableGrid):
    """-1, 0 and 1, in 2 bits."""

    title: ClassVar[str] = "ternary"
    bit_widths = (2,)

    @property
    def values(self) -> Tensor:
        return torch.tensor([-1.0, 0.0, 1.0])


@pytest.fixture(autouse=True)
def ternary() -> Iterator[None]:
    GRIDS.add("ternary", Ternary)
    with calm():
        yield
    GRIDS.remove("ternary")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return toy_checkpoint(tmp_path / "toy", width=64, heads=4, mlp=96, straddle=False)


def test_a_grid_of_a_test_runs_from_plan_to_verification(
    toy: Path, tmp_path: Path
) -> None:
    output, settings = tmp_path / "out", grid_settings("ternary")
    run_toy(toy, output, **settings, sweeps=1, refit=True, overrides=("v_proj@1=16",))
    found = verify(output, open_toy(toy))
    assert found.problems == []
    kept = "model.layers.1.self_attn.v_proj"
    assert set(found.weight_errors) == {*linear_names(2)} - {kept}
    state = decoded_state(output)
    for name in found.weight_errors:
        group_GC = state[f"{name}.weight"].reshape(-1, 32)
        size_G1 = group_GC.abs().amax(dim=1, keepdim=True)
        assert bool(((group_GC == 0) | (group_GC.abs() == size_G1)).all()), name
    plan = read_json(output / "rsq_stream.json")["plan"]
    assert (plan["grid"], plan["output_format"]) == ("ternary", "rsq-stream-grid")
    assert "2 bits, ternary, groups of 32" in (output / "README.md").read_text()


def test_its_run_goes_on_where_it_stopped(toy: Path, tmp_path: Path) -> None:
    settings = RUN | grid_settings("ternary")
    run_toy(toy, tmp_path / "whole", **settings)
    stopped(toy, tmp_path / "out", 1, "mlp in", **settings)
    run_toy(toy, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "--bits must be 2 with --grid ternary, not 3"),
        (
            {"overrides": ("q_proj=4",)},
            "--override must be 2 bits with --grid ternary, not 4 bits",
        ),
        ({"symmetric": False}, "--asymmetric: there are no zero points with --grid"),
    ],
)
def test_what_it_cannot_do_is_refused(
    toy: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        run_toy(toy, tmp_path / "out", **grid_settings("ternary") | changes)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_verify_names_a_grid_that_is_gone(toy: Path, tmp_path: Path) -> None:
    run_toy(toy, tmp_path / "out", method="rtn", **grid_settings("ternary"))
    GRIDS.remove("ternary")
    known, found = one_of(tuple(GRIDS)), verify(tmp_path / "out")
    GRIDS.add("ternary", Ternary)
    [problem] = found.problems
    assert problem.endswith(f"--grid must be {known}, not ternary")


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys; from rsq_stream.algorithm.grids import GRIDS; print(*GRIDS);"
        " sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [name for name in GRIDS if name != "ternary"]
