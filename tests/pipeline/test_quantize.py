"""A whole quantization of a toy: what comes out, and that only the plan decides it."""

import dataclasses
import hashlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsq_stream.algorithm.gptq.error_propagation import StageInput
from rsq_stream.algorithm.gptq.ldl import Factor, factorise
from rsq_stream.calibration.windows import Windows
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import BudgetError, CheckpointError, NumericalError
from rsq_stream.events import BlockFinished, RunStarted, ShardFinished, UnitsDone
from rsq_stream.model.block import Block
from rsq_stream.model.families.base import Stage
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD
from rsq_stream.pipeline import block_solver
from rsq_stream.pipeline.activations import finite_check
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.planning.validate import inspect_checkpoint
from tests.support.toy import (
    LINEARS,
    STAGES,
    Recorder,
    contents,
    execution_for,
    linear_names,
    open_toy,
    options_for,
    plan_toy,
    read_json,
    run_toy,
    toy_checkpoint,
    toy_windows,
)

UNIT_BYTES = 2 * 24 * 96 * 2
ROUNDED: dict[str, Any] = {"cache_type": "bfloat16"}
"""Activations are stored rounded, so that where they are kept could matter."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("pipeline") / "toy")


@pytest.fixture(scope="module")
def rsq(toy: Path) -> dict[str, bytes]:
    """The files of one run, to which others are compared."""
    output = toy.with_name("rsq")
    run_toy(toy, output, **ROUNDED)
    return contents(output)


def shards(folder: Path) -> dict[str, bytes]:
    return contents(folder, "*.safetensors")


@pytest.fixture(scope="module")
def plain(toy: Path) -> dict[str, bytes]:
    """The shards of plain GPTQ on a rotated model."""
    run_toy(toy, toy.with_name("plain"), method="gptq", rotation="portable")
    return shards(toy.with_name("plain"))


VARIANTS: dict[str, dict[str, Any]] = {
    "b1": {"execution": {"in_flight": 1}},
    "b5": {"options": {"units_in_flight": 5}},
    "w2": {"options": {"workers": 2}},
    "w4": {"options": {"workers": 4}},
    "disk": {"execution": {"resident_units": 0}},
    "mixed": {
        "execution": {"resident_units": 2, "in_flight": 2, "cached_mlp_units": 1}
    },
    "again": {"execution": {"cached_mlp_units": 0}},
    "w2-disk": {"options": {"workers": 2}, "execution": {"resident_units": 0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_how_it_runs_changes_no_byte(
    toy: Path, rsq: dict[str, bytes], tmp_path: Path, variant: str
) -> None:
    run_toy(toy, tmp_path / "out", **ROUNDED, **VARIANTS[variant])
    assert contents(tmp_path / "out") == rsq
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("resident", [0, 2, 3])
def test_the_budget_decides_what_stays_in_memory_and_no_byte(
    toy: Path,
    rsq: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resident: int,
) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(
        "rsq_stream.planning.memory.fit.psutil.Process", lambda: process
    )
    plan, _ = plan_toy(toy, **ROUNDED)
    free = execution_for(toy, plan, options_for(tmp_path / "out"))
    assert free.resident_units == 3
    ram = free.working_bytes + 3 * UNIT_BYTES * resident
    options = {"ram_bytes": ram + 3 * UNIT_BYTES - 1}
    chosen = options_for(tmp_path / "out", **options)
    assert execution_for(toy, plan, chosen).resident_units == resident
    run_toy(toy, tmp_path / "out", **ROUNDED, options=options)
    assert contents(tmp_path / "out") == rsq


def test_what_more_memory_spares(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """u is kept once all slots are in memory, and then not computed again."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(
        "rsq_stream.planning.memory.fit.psutil.Process", lambda: process
    )
    plan, _ = plan_toy(toy, **ROUNDED)
    free = execution_for(toy, plan, options_for(tmp_path / "out"))
    assert free.cached_mlp_units == plan.units
    each = free.mlp_bytes // plan.units
    all_slots = free.working_bytes + 3 * UNIT_BYTES * plan.units
    for kept, ram in ((0, all_slots + each - 1), (2, all_slots + 2 * each)):
        chosen = options_for(tmp_path / "out", ram_bytes=ram)
        assert execution_for(toy, plan, chosen).cached_mlp_units == kept
    computed = 0

    def counted(block: Block, m_BTD: Tensor) -> Tensor:
        nonlocal computed
        computed += 1
        return original(block, m_BTD)

    original = Block.mlp_output
    monkeypatch.setattr(Block, "mlp_output", counted)
    blocks = inspect_checkpoint(open_toy(toy)).blocks
    for kept in (0, 2, plan.units):
        computed, output = 0, tmp_path / str(kept)
        run_toy(toy, output, **ROUNDED, execution={"cached_mlp_units": kept})
        assert computed == blocks * (2 * plan.units - kept)


def test_a_budget_that_cannot_do_is_refused(toy: Path, tmp_path: Path) -> None:
    message = r"^--ram 0.00GiB is too little: this model needs \d\.\d\dGiB with one"
    with pytest.raises(BudgetError, match=message):
        run_toy(toy, tmp_path / "out", options={"ram_bytes": 1000})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "same",
    [
        {"importance": "uniform"},
        {"method": "quarot"},
        {"importance": "first-n", "importance_tokens": 24},
    ],
    ids=["uniform", "quarot", "first-all"],
)
def test_uniform_importance_is_gptq(
    toy: Path, plain: dict[str, bytes], tmp_path: Path, same: dict[str, Any]
) -> None:
    run_toy(toy, tmp_path / "same", **same)
    assert shards(tmp_path / "same") == plain


def test_attention_concentration_is_not(
    toy: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    run_toy(toy, tmp_path / "rsq")
    assert shards(tmp_path / "rsq").keys() == plain.keys()
    assert shards(tmp_path / "rsq") != plain


def test_first_n_looks_at_the_first_n_tokens_only(toy: Path, tmp_path: Path) -> None:
    window_BT = toy_windows(128, 5, 24, 0).window_BT
    later_BT = window_BT.clone()
    later_BT[:, 10:] = window_BT[:, 10:].flip(0)
    earlier_BT = window_BT.clone()
    earlier_BT[:, 9] = (window_BT[:, 9] + 1) % 128
    made = []
    for number, tokens in enumerate((window_BT, later_BT, earlier_BT)):
        output = tmp_path / str(number)
        first_n: dict[str, Any] = {"importance": "first-n", "importance_tokens": 10}
        run_toy(toy, output, windows=Windows(tokens, 1), **first_n)
        made.append(shards(output))
    assert made[0] == made[1] != made[2]


def test_expansion_is_the_rolled_windows(toy: Path, tmp_path: Path) -> None:
    expanded = Windows(toy_windows(128, 2, 24, 0).window_BT, 3)
    rolled = Windows(expanded.tokens(0, 6), 1)
    run_toy(toy, tmp_path / "a", windows=expanded, samples=2, expand=3)
    run_toy(toy, tmp_path / "b", windows=rolled, samples=6)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


def test_linears_with_one_input_share_a_hessian(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths, tokens = [], []

    def counted(hessian: Any, *rest: Any) -> Factor:
        widths.append(hessian.matrix_II.shape[0])
        tokens.append(hessian.tokens)
        return factorise(hessian, *rest)

    monkeypatch.setattr(block_solver, "factorise", counted)
    run_toy(toy, tmp_path / "out")
    assert len(STAGES) == 4
    assert widths == [96, 96, 96, 172] * 2
    assert tokens == [5 * 24] * 8


@pytest.mark.parametrize("method", ["rsq", "quarot", "gptq", "rtn"])
@pytest.mark.parametrize("bits", [2, 4])
def test_no_linear_is_worse_than_rounding(
    toy: Path, tmp_path: Path, method: str, bits: int
) -> None:
    summary = run_toy(toy, tmp_path / "out", method=method, bits=bits)
    assert [made.name for made in summary.records] == linear_names(2)
    for made in summary.records:
        assert 0 < made.relative_error <= made.rounding_error < 1
        assert (made.relative_error == made.rounding_error) == (method == "rtn")
        assert made.group_size == (-1 if made.name.endswith("down_proj") else 32)
        assert (made.bits, made.dead_inputs) == (bits, 0)
    assert sum(made.kept_rounding for made in summary.records) < 0.02 * 14


def test_rounding_looks_at_no_text(toy: Path, tmp_path: Path) -> None:
    plan, windows = plan_toy(toy, method="rtn")
    assert windows is None
    assert (plan.windows_sha256, plan.calibration) == ("", "none")
    recorder = Recorder()
    run_toy(toy, tmp_path / "a", method="rtn", listener=recorder)
    other = toy_windows(128, 5, 24, 9)
    run_toy(toy, tmp_path / "b", method="rtn", windows=other)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not [event for event in recorder.events if isinstance(event, UnitsDone)]


def test_what_it_says_while_it_works(toy: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    summary = run_toy(toy, tmp_path / "out", listener=recorder)
    started, *_ = [e for e in recorder.events if isinstance(e, RunStarted)]
    assert (started.blocks, started.first_block, started.tokens) == (2, 0, 120)
    for stage in (*(stage.name for stage in STAGES), "outputs"):
        done = [
            event
            for event in recorder.events
            if isinstance(event, UnitsDone) and (event.block, event.stage) == (1, stage)
        ]
        assert sum(event.units for event in done) == 3
        assert sum(event.tokens for event in done) == 120
    blocks = [event for event in recorder.events if isinstance(event, BlockFinished)]
    assert [event.block for event in blocks] == [0, 1]
    assert blocks[0].records + blocks[1].records == summary.records
    named = [event for event in recorder.events if isinstance(event, ShardFinished)]
    assert len(named) == 2
    for event in named:
        assert (tmp_path / "out" / event.name).stat().st_size == event.bytes


def test_the_manifest_seals_the_folder(toy: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary = run_toy(toy, output)
    files = contents(output)
    manifest = read_json(output / "rsq_stream.json")
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
        if not name.startswith("rsq_stream.")
    }
    digest = hashlib.sha256(files["rsq_stream.json"]).hexdigest()
    assert files["rsq_stream.sha256"].decode() == f"{digest}  rsq_stream.json\n"
    plan, _ = plan_toy(toy)
    assert QuantizationPlan.from_fields(manifest["plan"]) == plan
    assert manifest["plan_sha256"] == plan.sha256
    assert manifest["linears"] == [dataclasses.asdict(r) for r in summary.records]
    del files["rsq_stream.sha256"]
    assert summary.output_bytes == sum(map(len, files.values()))


def test_sizes_are_known_beforehand(toy: Path, tmp_path: Path) -> None:
    for number, group_size in enumerate((32, -1)):
        output = tmp_path / str(number)
        plan, _ = plan_toy(toy, symmetric=False, group_size=group_size)
        expected = execution_for(toy, plan, options_for(output))
        run_toy(toy, output, symmetric=False, group_size=group_size)
        assert sum(map(len, shards(output).values())) == expected.output_bytes
        stored = sum(entry.size_bytes for entry in open_toy(output).tensors.values())
        weights = sum(e.size_bytes // 4 for e in open_toy(toy).tensors.values())
        assert expected.bits_per_weight == pytest.approx(8 * stored / weights)
        assert expected.fallbacks == ("mlp.down_proj",)[: group_size == 32]


def test_whole_chunks_are_written(toy: Path, tmp_path: Path) -> None:
    """The last unit has one sequence of two, and a chunk as large as the others."""
    plan, _ = plan_toy(toy, **ROUNDED)
    assert (plan.units, plan.sequences) == (3, 5)
    made = execution_for(toy, plan, options_for(tmp_path / "out"))
    blocks = inspect_checkpoint(open_toy(toy)).blocks
    slots = plan.streams * (2 * blocks + 1)
    assert made.written_bytes - made.output_bytes == slots * 3 * UNIT_BYTES


def _broken(toy: Path, folder: Path, name: str, place: int, value: float) -> Path:
    """Copy a toy into one shard, with one weight replaced."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(toy.glob("*.safetensors")):
        tensors |= load_file(shard)
    tensors[name].view(-1)[place] = value
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((toy / "config.json").read_bytes())
    return folder


def test_the_first_bad_token_is_named(toy: Path, tmp_path: Path) -> None:
    # Finite in the source, and an overflow only in the type of the activations.
    window_BT = torch.full((5, 24), 7)
    window_BT[3, 11] = 99
    broken = _broken(toy, tmp_path / "broken", EMBEDDING, 99 * 96, 1e6)
    message = (
        r"^block 0, attention in, sequence 3, token 11: the activations hold NaN or"
        r" infinity; the source weights or their type cannot be right there$"
    )
    settings: dict[str, Any] = {"method": "gptq", "cache_type": "float16"}
    with pytest.raises(NumericalError, match=message):
        run_toy(broken, tmp_path / "out", windows=Windows(window_BT, 1), **settings)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("stream", [0, 1])
def test_both_streams_are_looked_at(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: int, gpu: bool
) -> None:
    """What full precision cannot hold would go into a stage's targets."""
    calls = itertools.count()
    original = Stream.stage_input

    def spoiled(self: Stream, stage: Stage, unit: int, read_BTD: Tensor) -> StageInput:
        made = original(self, stage, unit, read_BTD)
        if stage.name == "attention out" and next(calls) % 2 == stream and unit == 1:
            made.value_BTI[0, 3, 2] = float("nan")
        return made

    monkeypatch.setattr(Stream, "stage_input", spoiled)
    if gpu:  # one look, at the end of the pass
        monkeypatch.setattr(finite_check, "_looks_at_each_unit", lambda _: False)
    execution = {"in_flight": 1, "resident_units": 0}
    settings: dict[str, Any] = {"propagate": 0.5, "execution": execution}
    message = r"^block 0, attention out, sequence 2, token 3"
    with pytest.raises(NumericalError, match=message):
        run_toy(toy, tmp_path / "out", **settings)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(
    "name",
    [
        f"model.layers.1.{LINEARS[-1]}.weight",
        "model.layers.1.input_layernorm.weight",
        EMBEDDING,
        FINAL_NORM,
        LM_HEAD,
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    toy: Path, tmp_path: Path, name: str, value: float, method: str
) -> None:
    broken = _broken(toy, tmp_path / "broken", name, 5, value)
    with pytest.raises((NumericalError, CheckpointError), match=name):
        run_toy(broken, tmp_path / "out", method=method)
    assert not (tmp_path / "out" / "rsq_stream.sha256").exists()
