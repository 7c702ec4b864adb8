"""A format is one file: one of a test is written, read back and verified."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import rsq_stream
from rsq_stream.algorithm.gptq.solver import Solution
from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.algorithm.grids.integer import IntegerGrid
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.formats._safetensors import SafetensorsFormat
from rsq_stream.checkpoint.formats._targets import targets_by_scheme
from rsq_stream.checkpoint.formats.base import OutputTensor, Read
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import UsageError, one_of
from rsq_stream.evaluation.perplexity import evaluate
from rsq_stream.model.architecture import Architecture
from rsq_stream.output.verify import verify
from tests.pipeline.test_repair import RUN, stopped
from tests.support.cli_runs import Run
from tests.support.entries import format_settings, grid_settings
from tests.support.toy import (
    calm,
    contents,
    decoded_state,
    linear_names,
    open_toy,
    plan_toy,
    read_json,
    run_toy,
    toy_checkpoint,
    toy_windows,
)


class PlainBytes(SafetensorsFormat):
    """Integers of a scale a row, each code in a byte of its own."""

    config_name: ClassVar[str] = "bytes"
    marks_rotations: ClassVar[bool] = False

    def stores(self, grid: type[Grid]) -> bool:
        return issubclass(grid, IntegerGrid)

    def require(self, plan: QuantizationPlan, architecture: Architecture) -> None:
        super().require(plan, architecture)
        if plan.group_size != -1 or not plan.symmetric:
            raise UsageError("--format bytes has a scale a row and no zero points")

    def tensors(
        self, name: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
    ) -> list[OutputTensor]:
        del scheme
        return [
            OutputTensor(f"{name}.codes", torch.uint8, shape),
            OutputTensor(f"{name}.scales", dtype, (shape[0], 1)),
        ]

    def encode_rows(
        self, name: str, solution: Solution, scheme: Scheme, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        del scheme
        scale_OG = solution.scale_OG.to(dtype)
        return {f"{name}.codes": solution.code_OI, f"{name}.scales": scale_OG}

    def decode(self, read: Read, name: str, scheme: Scheme) -> Float[Tensor, "O I"]:
        scale_O1 = read(f"{name}.scales")
        code_OI = read(f"{name}.codes").float() - 2 ** (scheme.bits - 1)
        weight_OI: Tensor = code_OI * scale_O1.float()
        return weight_OI.to(scale_O1.dtype).float()

    def row_reader(
        self, stored: Checkpoint, scheme: Scheme, outputs: int, rows: range
    ) -> Read:
        del scheme, outputs
        return lambda name: stored.read_rows(name, torch.tensor([*rows]))

    def typed_tensor(self, linear: str) -> str:
        return f"{linear}.scales"

    def description(
        self, plan: QuantizationPlan, architecture: Architecture
    ) -> dict[str, Any]:
        targets, ignored = targets_by_scheme(plan, architecture)
        groups = {
            str(number): {"targets": patterns, "weights": {"bits": scheme.bits}}
            for number, (scheme, patterns) in enumerate(targets.items())
        }
        return {"format": "bytes", "config_groups": groups, "ignore": ignored}

    def scheme(
        self, weights: Mapping[str, Any], quantization: Mapping[str, Any]
    ) -> Scheme | None:
        del quantization
        return Scheme(int(weights["bits"]), -1, symmetric=True)


BYTES: dict[str, Any] = {"output_format": "bytes", "group_size": -1}
WINDOWS = toy_windows(128, 4, 33, 3).window_BT


@pytest.fixture(autouse=True)
def plain_bytes() -> Iterator[None]:
    FORMATS.add("bytes", PlainBytes())
    with calm():
        yield
    FORMATS.remove("bytes")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "toy"
    sizes: dict[str, Any] = {"width": 64, "heads": 4, "mlp": 96, "straddle": False}
    return toy_checkpoint(folder, **sizes, dtype=torch.bfloat16)


def same_weights(one: Path, other: Path) -> None:
    states = decoded_state(one), decoded_state(other)
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_format_of_a_test_is_written_read_back_and_verified(
    toy: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"group_size": -1, "head_bits": 8}
    settings["overrides"] = ("v_proj@1=16",)
    run_toy(toy, tmp_path / "packed", **settings)
    run_toy(toy, tmp_path / "out", **settings | BYTES)
    found = verify(tmp_path / "out", open_toy(toy))
    assert found.problems == []
    kept = "model.layers.1.self_attn.v_proj"
    assert set(found.weight_errors) == {*linear_names(2)} - {kept}
    same_weights(tmp_path / "out", tmp_path / "packed")
    state = rsq_stream.load_model(tmp_path / "out").state_dict()
    expected = decoded_state(tmp_path / "out")
    assert all(torch.equal(state[n].float(), expected[n].float()) for n in expected)
    losses = [
        evaluate(open_toy(tmp_path / name), WINDOWS).loss for name in ("out", "packed")
    ]
    assert losses[0] == losses[1]
    manifest = read_json(tmp_path / "out" / "rsq_stream.json")
    assert manifest["plan"]["output_format"] == "bytes"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "tags: [quantized, rsq-stream]" in card
    assert "rsq_stream.load_model" in card


@pytest.mark.parametrize("name", [*FORMATS, "bytes"])
def test_a_run_goes_on_where_it_stopped(toy: Path, tmp_path: Path, name: str) -> None:
    settings = BYTES if name == "bytes" else format_settings(name)
    run_toy(toy, tmp_path / "whole", **RUN | settings)
    stopped(toy, tmp_path / "out", 1, "mlp in", **settings)
    run_toy(toy, tmp_path / "out", **RUN | settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        (name, grid)
        for name, stored in FORMATS.items()
        for grid in GRIDS
        if stored.stores(GRIDS[grid])
    ],
)
def test_each_format_stores_its_grids(
    toy: Path, tmp_path: Path, name: str, grid: str
) -> None:
    settings = grid_settings(grid) | {"output_format": name}
    run_toy(toy, tmp_path / "out", method="rtn", **settings)
    assert verify(tmp_path / "out", open_toy(toy)).problems == []
    assert read_json(tmp_path / "out" / "rsq_stream.json")["plan"]["grid"] == grid
    decoded_state(tmp_path / "out")


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_is_stored_by_its_format_unless_another_is_asked_for(
    toy: Path, grid: str
) -> None:
    plan, _ = plan_toy(toy, **grid_settings(grid))
    assert plan.output_format == GRIDS[grid].output_format
    assert FORMATS[plan.output_format].stores(GRIDS[grid])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"output_format": "compressed-tensors", "grid": "nf"},
            "--format compressed-tensors cannot store --grid nf: leave --format out",
        ),
        (
            {"output_format": "rsq-stream-grid"},
            "--format rsq-stream-grid cannot store --grid integer: leave --format out",
        ),
        (
            BYTES | {"rotation": "full"},
            (
                "--rotation must be portable or none for bytes, which cannot say what"
                " is left to be done at inference, not full"
            ),
        ),
        (
            BYTES | {"group_size": 32},
            "--format bytes has a scale a row and no zero points",
        ),
    ],
)
def test_what_a_format_cannot_store_is_refused(
    toy: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plan_toy(toy, **settings)
    assert str(caught.value) == message


def test_verify_names_a_format_that_is_gone(toy: Path, tmp_path: Path) -> None:
    run_toy(toy, tmp_path / "out", method="rtn", **BYTES)
    FORMATS.remove("bytes")
    known, found = one_of(tuple(FORMATS)), verify(tmp_path / "out")
    FORMATS.add("bytes", PlainBytes())
    [problem] = found.problems
    assert problem.endswith(f"--format must be {known}, not bytes")


def test_the_command_line_takes_a_format(run: Run) -> None:
    arguments = ("plan", rsq_stream.demo.MODEL, "--method", "rtn", "--json")
    code, out, err = run(*arguments, "--format", "bytes", "--group-size", "-1")
    assert (code, '"output_format": "bytes"' in out) == (0, True), err
    code, out, err = run(*arguments, "--format", "rsq-stream-grid")
    assert (code, out) == (1, "")
    assert "--format rsq-stream-grid cannot store --grid integer" in err
    code, out, err = run(*arguments, "--format", "onnx")
    assert (code, out) == (1, "")
    assert f"--format must be {one_of(tuple(FORMATS))}, not onnx" in err


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys; from rsq_stream.checkpoint.formats import FORMATS; print(*FORMATS)"
        "; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [name for name in FORMATS if name != "bytes"]
