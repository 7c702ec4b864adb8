"""The memory that ``--bpw`` and rounding alone take on a GPU, planned and kept."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from rsq_stream.checkpoint.files import FolderFiles
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.execution_plan import StageMemory
from rsq_stream.config.run_options import RunOptions
from rsq_stream.config.settings import Settings
from rsq_stream.errors import BudgetError
from rsq_stream.model.architecture import read_architecture
from rsq_stream.pipeline.bit_allocation.block_sensitivity import BlockSensitivity
from rsq_stream.pipeline.bit_allocation.measure import measure, sensitivity_plan
from rsq_stream.planning import quantization_plan
from rsq_stream.planning.execution_plan import plan_execution
from rsq_stream.planning.memory.sensitivity import SensitivityMemoryModel
from rsq_stream.planning.memory.stages import StageMemoryModel
from rsq_stream.planning.quantization_plan import make_plan
from rsq_stream.planning.validate import inspect_checkpoint
from tests.planning.test_memory_stages import LLAMA, write_headers
from tests.support.toy import (
    contents,
    execution_for,
    job_of,
    open_toy,
    options_for,
    plan_toy,
    run_toy,
    toy_checkpoint,
)

GIB = 1 << 30
WIDTH, MLP, KEYS = 8192, 28672, 1024
ATTENTION = 2 * WIDTH * WIDTH + 2 * KEYS * WIDTH
LINEARS = ATTENTION + 3 * MLP * WIDTH
BLOCK = LINEARS + 2 * WIDTH
LARGEST = MLP * WIDTH


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_headers(tmp_path_factory.mktemp("shapes") / "70B", LLAMA["70B"])


@pytest.fixture(autouse=True)
def no_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan for a card that is not here, but where a test needs one."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(quantization_plan, "device_kind", lambda _: "a card")


def stages(folder: Path, method: str, **changed: Any) -> dict[str, StageMemory]:
    checkpoint = Checkpoint(FolderFiles(folder))
    architecture = read_architecture(checkpoint.config, "here")
    chosen, device = Settings(bits=2, method=method), torch.device("cuda")
    plan = make_plan(checkpoint, architecture, chosen, None, device=device)
    kind = StageMemoryModel
    if plan.needs_calibration:
        plan, kind = sensitivity_plan(plan), SensitivityMemoryModel
    fields: dict[str, Any] = {"in_flight": 1, "workers": 1, "on_gpu": True}
    made = kind(
        architecture=architecture,
        plan=plan,
        source_type=torch.bfloat16,
        **fields | changed,
    )
    return {stage.name: stage for stage in made.stages()}


@pytest.mark.parametrize("streams", [False, True])
def test_measuring_by_hand(model: Path, streams: bool) -> None:
    """down of 70B: H, W in fp32 while it is rounded; the host has all that were."""
    found = stages(model, "rsq", offloads_weights=streams)["mlp out: measure down"]
    tokens = 256 * 4096
    passes = 0 if streams else 2 * BLOCK
    rounding = (4 + 8 + 24) * LARGEST + 4 * 512 * MLP  # and blocks beside H
    assert found.device_bytes == passes + 4 * MLP * MLP + rounding + 2 * tokens
    # down in fp32; in bf16 those that are rounded, and what the passes fetch.
    fetched = 2 * LINEARS if streams else 0
    probes = 2 * (LINEARS - LARGEST)
    pinned = 2 * 2 * 2 * 4096 * 8192  # of a unit in flight and one more, both ways
    assert found.host_bytes == 4 * LARGEST + probes + fetched + 4 * tokens + pinned


def test_the_last_passes_keep_what_was_rounded(model: Path) -> None:
    made = stages(model, "rsq")
    assert list(made)[-2:] == ["probes: pass", "outputs: pass"]
    for name in list(made)[-2:]:
        assert made[name].host_bytes > 2 * LINEARS
    assert made["probes: pass"].device_bytes > 2 * (BLOCK + LARGEST)


def test_rounding_alone_by_hand(model: Path) -> None:
    """Where a block does not fit, its linears come one by one."""
    kept = stages(model, "rtn")["round"]
    fetched = stages(model, "rtn", offloads_weights=True)["round"]
    assert (kept.device_bytes, kept.host_bytes) == (4 * BLOCK + 32 * LARGEST, 0)
    assert fetched.device_bytes == 36 * LARGEST
    assert fetched.host_bytes == 4 * BLOCK


@pytest.mark.parametrize("method", ["rsq", "rtn"])
def test_a_smaller_card_has_weights_fetched(model: Path, method: str) -> None:
    checkpoint = Checkpoint(FolderFiles(model))
    architecture = inspect_checkpoint(checkpoint)
    chosen, device = Settings(bits=2, method=method), torch.device("cuda")
    plan = make_plan(checkpoint, architecture, chosen, None, device=device)
    measures = method == "rsq"
    plan = sensitivity_plan(plan) if measures else plan

    def streams(gib: float) -> bool:
        options = RunOptions(
            output=model / "o",
            work_dir=model / "w",
            device="cuda",
            vram_bytes=int(gib * GIB),
            ram_bytes=64 * GIB,
        )
        made = plan_execution(
            checkpoint, architecture, plan, options, measures=measures
        )
        assert made.device_bytes <= int(gib * GIB)
        return made.offloads_weights

    assert not streams(16)
    assert streams(13 if measures else 9)
    with pytest.raises(BudgetError, match="--vram"):
        streams(4)


def test_what_is_measured_or_rounded_is_in_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and probes: on a GPU each is there only while it is used."""
    toy = toy_checkpoint(tmp_path / "toy")
    plan, windows = plan_toy(toy, method="gptq", sequence_length=16)
    assert windows is not None
    plan = sensitivity_plan(plan)
    options = options_for(tmp_path / "out")
    seen = []
    shares = BlockSensitivity._shares

    def watched(meter: BlockSensitivity) -> dict[str, float]:
        assert meter.weights == {}
        kind = meter.stream.block.weight("mlp.down_proj").dtype
        for rounded_OI, _ in meter._probes.values():
            assert (rounded_OI.device.type, rounded_OI.dtype) == ("cpu", kind)
        seen.append(len(meter._probes))
        return shares(meter)

    monkeypatch.setattr(BlockSensitivity, "_shares", watched)
    execution = execution_for(toy, plan, options)
    parts = {"plan": plan, "execution": execution, "options": options}
    measure(job_of(open_toy(toy), **parts, windows=windows))
    assert seen == [7, 7]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["rtn", "rsq"])
def test_where_weights_lie_decides_nothing(tmp_path: Path, method: str) -> None:
    toy = toy_checkpoint(tmp_path / "toy", blocks=2, dtype=torch.bfloat16)
    on_gpu: dict[str, Any] = {"plan": {"compute_type": "bfloat16"}, "method": method}
    made: list[Any] = []
    for streams in (False, True):
        output, place = tmp_path / f"out-{streams}", {"device": "cuda"}
        execution = {"offloads_weights": streams}
        if method == "rtn":
            run_toy(toy, output, options=place, execution=execution, **on_gpu)
            made.append(contents(output, "*.safetensors"))
            continue
        plan, windows = plan_toy(toy, **on_gpu)
        assert windows is not None
        plan, options = sensitivity_plan(plan), options_for(output, **place)
        fitted = execution_for(toy, plan, options)
        fitted = dataclasses.replace(fitted, offloads_weights=streams)
        parts = {"plan": plan, "execution": fitted, "options": options}
        made.append(measure(job_of(open_toy(toy), **parts, windows=windows)))
    assert made[0] == made[1]
