"""``--bpw``: what is measured, what is chosen, and that both survive anything."""

import dataclasses
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.grids._planned import make_grid
from rsq_stream.algorithm.grids.integer import decode
from rsq_stream.checkpoint.source import Source
from rsq_stream.config.schemes import LM_HEAD_LINEAR
from rsq_stream.errors import Interrupted, ScratchError, UsageError
from rsq_stream.events import BlockFinished, Event, Notice, StageStarted
from rsq_stream.output.layout import output_bits, source_weights
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.pipeline.bit_allocation.choose_bits import (
    Choice,
    choose_bits,
    require_reachable,
)
from rsq_stream.pipeline.bit_allocation.costs import BITS, PROBE_BITS, Costs
from rsq_stream.pipeline.bit_allocation.measure import measure, sensitivity_plan
from rsq_stream.planning.validate import inspect_checkpoint
from rsq_stream.runtime.worker_pool import Pool
from tests.pipeline.test_out_of_memory import Scarce
from tests.pipeline.test_resume import SMALL
from tests.support.fake_copies import take_a_gpus_way
from tests.support.toy import (
    LINEARS,
    STAGES,
    Recorder,
    execution_for,
    job_of,
    linear_names,
    open_toy,
    options_for,
    plan_toy,
    run_toy,
    toy_checkpoint,
)

SETTINGS: dict[str, Any] = {
    "sequence_length": 16,
    "clip_steps": 4,
    "bits": 2,
    "cache_type": "bfloat16",
}
BLOCKS = 3


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpw") / "toy"
    return toy_checkpoint(folder, **SMALL, blocks=BLOCKS, straddle=False)


def measured(toy: Path, output: Path, **changes: Any) -> Costs:
    """Measure a toy into the work folder of an output."""
    recorder = changes.pop("listener", Recorder())
    stop = changes.pop("stop", None)
    execution = changes.pop("execution", {"in_flight": 3, "resident_units": 1})
    options = options_for(output, **changes.pop("options", {}))
    plan, windows = plan_toy(toy, **SETTINGS | changes)
    assert windows is not None
    plan = sensitivity_plan(plan)
    made = execution_for(toy, plan, options, **execution)
    parts = {"plan": plan, "execution": made, "options": options}
    job = job_of(open_toy(toy), **parts, windows=windows)
    return measure(job, listener=recorder, stop=stop)


@pytest.fixture(scope="module")
def costs(toy: Path) -> Costs:
    return measured(toy, toy.with_name("once"))


def chosen(toy: Path, costs: Costs, bpw: float, /, **settings: Any) -> Choice:
    checkpoint = open_toy(toy)
    plan, _ = plan_toy(toy, **SETTINGS | settings)
    return choose_bits(
        checkpoint, inspect_checkpoint(checkpoint), plan, costs=costs, bpw=bpw
    )


def test_all_linears_have_costs_that_fall(costs: Costs) -> None:
    assert sorted(costs) == sorted(linear_names(BLOCKS))
    for found in costs.values():
        assert list(found) == list(BITS)
        values = list(found.values())
        assert all(value > 0 for value in values)
        assert values == sorted(values, reverse=True)
        # A bit more is a quarter of the noise, roughly.
        assert 2 < found[4] / found[5] < 8


def test_a_gpus_way_of_activations_changes_no_cost(
    toy: Path, costs: Costs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_a_gpus_way(monkeypatch, 0)
    assert measured(toy, tmp_path / "out") == costs


def test_a_cost_is_what_the_block_loses(toy: Path, costs: Costs) -> None:
    """At the probe's bits: rounded weights in the block, against its own output.

    The loss that the factor foretells stands in for rounding's, so it is less.
    """
    plan, windows = plan_toy(toy, **SETTINGS)
    assert windows is not None
    made = sensitivity_plan(plan)
    checkpoint = open_toy(toy)
    architecture = inspect_checkpoint(checkpoint)
    source = Source(
        checkpoint, architecture=architecture, plan=made, device=torch.device("cpu")
    )
    from rsq_stream.model.block import Block
    from rsq_stream.model.transformers_layers import Rope, layer_config

    config = layer_config(architecture.family, checkpoint.config)
    rope = Rope(
        architecture.family,
        config,
        tokens=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    tensors = source.block(0)
    embedding_VD = torch.cat(list(source.embedding()))
    x_BTD = embedding_VD[windows.window_BT].bfloat16().float()

    def output(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return Block(architecture.family, config, 0, weights, rope=rope).forward(x_BTD)

    before_BTD = output(tensors)
    for linear in LINEARS:
        weight_OI = tensors[f"{linear}.weight"]
        scheme = made.scheme(f"model.layers.0.{linear}", weight_OI.shape[1])
        assert scheme is not None
        grid = make_grid(made, PROBE_BITS, torch.float32)
        found = round_to_nearest(
            weight_OI, grid, scheme.group_size, tile_rows=128, pool=Pool(1)
        )
        rounded_OI = decode(found.code_OI, found.scale_OG, found.zero_OG, torch.float32)
        change_BTD = output(tensors | {f"{linear}.weight": rounded_OI}) - before_BTD
        share = (change_BTD.square().sum(-1) / before_BTD.square().sum(-1)).mean()
        cost = costs[f"model.layers.0.{linear}"][PROBE_BITS]
        assert 0.2 * share < cost < 1.05 * share


def test_how_it_runs_changes_no_cost(toy: Path, costs: Costs, tmp_path: Path) -> None:
    again = measured(
        toy,
        tmp_path / "out",
        execution={"in_flight": 1, "resident_units": 0},
        options={"workers": 2},
    )
    assert again == costs


@pytest.mark.parametrize("stage", [STAGES[0].name, STAGES[3].name, "outputs"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_stopped_it_goes_on(
    toy: Path, costs: Costs, tmp_path: Path, block: int, stage: str
) -> None:
    stop, output = threading.Event(), tmp_path / "out"

    def listener(event: Event) -> None:
        if isinstance(event, StageStarted) and (event.block, event.stage) == (
            block,
            stage,
        ):
            stop.set()

    message = f"goes on after block {block} of {BLOCKS}$"
    with pytest.raises(Interrupted, match=message):
        measured(toy, output, listener=listener, stop=stop)
    recorder = Recorder()
    assert measured(toy, output, listener=recorder) == costs
    done = [e.block for e in recorder.events if isinstance(e, BlockFinished)]
    assert done == list(range(block, BLOCKS))
    left = {path.name for path in (tmp_path / "out.work" / "bits").iterdir()}
    assert left == {"journal.sqlite", "lock"}


def test_a_disk_without_room_is_named_first(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=10, total=10, used=0)
    monkeypatch.setattr(
        "rsq_stream.pipeline.disk_space.shutil.disk_usage", lambda path: free
    )
    with pytest.raises(ScratchError, match=r"more bytes will be needed on this disk"):
        measured(toy, tmp_path / "out")


def test_once_is_enough_for_any_target(toy: Path, costs: Costs) -> None:
    recorder = Recorder()
    again = measured(toy, toy.with_name("once"), listener=recorder, sweeps=2, bits=5)
    assert again == costs
    assert recorder.events == []


def test_other_settings_are_measured_anew(toy: Path, tmp_path: Path) -> None:
    measured(toy, tmp_path / "out")
    recorder = Recorder()
    measured(toy, tmp_path / "out", listener=recorder, group_size=-1)
    (notice,) = (e.text for e in recorder.events if isinstance(e, Notice))
    assert notice.endswith("the bits are measured again")
    assert len([e for e in recorder.events if isinstance(e, BlockFinished)]) == BLOCKS


def test_damaged_activations_are_measured_again(
    toy: Path, costs: Costs, tmp_path: Path
) -> None:
    stop, output = threading.Event(), tmp_path / "out"

    def listener(event: Event) -> None:
        if isinstance(event, BlockFinished):
            stop.set()

    with pytest.raises(Interrupted):
        measured(toy, output, listener=listener, stop=stop)
    chunk = tmp_path / "out.work" / "bits" / "odd" / "c.1.0.0"
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    recorder = Recorder()
    assert measured(toy, output, listener=recorder) == costs
    (notice,) = (e.text for e in recorder.events if isinstance(e, Notice))
    assert "odd" in notice


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9, 1.3, 2.6, 5.0])
def test_the_output_has_the_bits_that_were_asked_for(
    toy: Path, costs: Costs, tmp_path: Path, fraction: float
) -> None:
    uniform = chosen(toy, costs, least_bpw(toy)).uniform
    bpw = uniform[2][0] + fraction * (uniform[3][0] - uniform[2][0])
    found = chosen(toy, costs, bpw)
    # A step of this toy's smallest linear: no choice can come closer.
    assert bpw - 0.05 < found.bits_per_weight <= bpw + 0.01
    if 0 < fraction < 1:
        straight = (1 - fraction) * uniform[2][1] + fraction * uniform[3][1]
        assert found.cost < straight
    output = tmp_path / "out"
    run_toy(
        toy,
        output,
        **SETTINGS
        | {"plan": {"bits": found.plan.bits, "overrides": found.plan.overrides}},
    )
    tensors = open_toy(output).tensors.values()
    stored = 8 * sum(entry.size_bytes for entry in tensors)
    weights = sum(
        entry.size_bytes // entry.dtype.itemsize
        for entry in open_toy(toy).tensors.values()
    )
    assert stored / weights == pytest.approx(found.bits_per_weight, abs=1e-9)


def least_bpw(toy: Path) -> float:
    """Return the bits per weight of the smallest output."""
    checkpoint = open_toy(toy)
    plan, _ = plan_toy(toy, **SETTINGS)
    from rsq_stream.output.layout import output_bits, source_weights

    architecture = inspect_checkpoint(checkpoint)
    return output_bits(checkpoint, architecture, plan) / source_weights(architecture)


def test_a_large_enough_model_lands_within_a_hundredth(tmp_path: Path) -> None:
    """32 blocks, a small vocabulary: 2.5 and 3.25 over the whole file."""
    toy = toy_checkpoint(
        tmp_path / "toy",
        width=128,
        heads=4,
        kv_heads=2,
        mlp=384,
        blocks=32,
        vocabulary=32,
        dtype=torch.bfloat16,
        straddle=False,
    )
    generator = random.Random(0)
    costs = {}
    for name in linear_names(32):
        scale = generator.random()
        costs[name] = {bits: scale / 4.0**bits for bits in BITS}
    for bpw in (2.5, 3.25):
        found = chosen(toy, costs, bpw, group_size=128)
        assert abs(found.bits_per_weight - bpw) <= 0.01
        checkpoint = open_toy(toy)
        made = execution_for(toy, found.plan, options_for(tmp_path / "out"))
        assert made.bits_per_weight == pytest.approx(found.bits_per_weight)
        assert checkpoint.config["num_hidden_layers"] == 32


def test_what_runtimes_fuse_shares_its_bits(toy: Path, costs: Costs) -> None:
    found = chosen(toy, costs, least_bpw(toy) + 0.6).plan
    assert found.overrides
    for block in range(BLOCKS):
        for stage in STAGES:
            schemes = {
                found.scheme(f"model.layers.{block}.{linear.name}", 32)
                for linear in stage.linears
            }
            assert len(schemes) == 1


@pytest.mark.parametrize(
    ("name", "at"),
    [("stage_input", {2}), ("_stored", {5}), ("_stored", {10})],
    ids=["attention in", "mlp in", "outputs"],
)
def test_memory_that_runs_out_changes_no_cost(
    toy: Path,
    costs: Costs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    at: set[int],
) -> None:
    """Fewer units in flight, as in a run."""
    scarce, heard = Scarce(getattr(Stream, name), at), Recorder()
    monkeypatch.setattr(Stream, name, lambda *given: scarce(*given))
    assert measured(toy, tmp_path / "out", listener=heard) == costs
    texts = [event.text for event in heard.events if isinstance(event, Notice)]
    assert any("memory ran out; 1 units in flight from now" in text for text in texts)


def test_overrides_still_win(toy: Path, costs: Costs) -> None:
    own = ("v_proj=16", "down_proj@1=8")
    found = chosen(toy, costs, least_bpw(toy) + 2, overrides=own, head_bits=8).plan
    for block in range(BLOCKS):
        assert found.scheme(f"model.layers.{block}.self_attn.v_proj", 32) is None
    down = found.scheme("model.layers.1.mlp.down_proj", 44)
    assert down is not None
    assert down.bits == 8
    head = found.scheme(LM_HEAD_LINEAR, 32)
    assert head is not None
    assert head.bits == 8


def test_an_override_wins_over_bits_that_stand_in_for_those_to_come(
    toy: Path, costs: Costs
) -> None:
    """With ``--bpw`` the plan has 2 bits until they are chosen."""
    own = {"overrides": ("down_proj=2",), "bits": None, "bpw": 9.0}
    found = chosen(toy, costs, least_bpw(toy) + 2, **own).plan
    assert found.bits > 2
    for block in range(BLOCKS):
        down = found.scheme(f"model.layers.{block}.mlp.down_proj", 44)
        assert down is not None
        assert down.bits == 2


def test_overrides_may_leave_nothing_to_choose(toy: Path, costs: Costs) -> None:
    """A plan in which all linears have as many bits names none of them."""
    fixed, _ = plan_toy(toy, **SETTINGS | {"bits": 4})
    checkpoint = open_toy(toy)
    architecture = inspect_checkpoint(checkpoint)
    bpw = output_bits(checkpoint, architecture, fixed) / source_weights(architecture)
    own = {"overrides": ("*=4",), "bits": None, "bpw": 9.0}
    found = chosen(toy, costs, bpw, **own)
    assert found.bits_per_weight == pytest.approx(bpw)
    assert {line.partition("=")[2] for line in found.plan.overrides} <= {"4"}


def test_a_target_out_of_reach_is_refused_with_what_would_do(toy: Path) -> None:
    checkpoint = open_toy(toy)
    plan, _ = plan_toy(toy, **SETTINGS)
    architecture = inspect_checkpoint(checkpoint)
    least = least_bpw(toy)
    for bpw in (0.0, least - 0.02, 20.0, float("nan")):
        with pytest.raises(UsageError, match=rf"--bpw must be {least:.2f} to"):
            require_reachable(checkpoint, architecture, plan, bpw)
    require_reachable(checkpoint, architecture, plan, least)


def test_the_measuring_plan_forgets_what_it_does_not_depend_on(toy: Path) -> None:
    plan, _ = plan_toy(toy, **SETTINGS)
    other, _ = plan_toy(
        toy, **SETTINGS | {"bits": 4, "propagate": 0.5, "overrides": ("v_proj=16",)}
    )
    assert sensitivity_plan(plan) == sensitivity_plan(other)
    changed = dataclasses.replace(plan, damping=0.02)
    assert sensitivity_plan(plan) != sensitivity_plan(changed)
