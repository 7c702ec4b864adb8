"""A family is one file: one that a test registers runs as those of the package do."""

import dataclasses
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rsq_stream.errors import Interrupted, UnsupportedModelError
from rsq_stream.evaluation.perplexity import evaluate
from rsq_stream.events import BlockFinished, Event
from rsq_stream.model.families import FAMILIES
from rsq_stream.model.families.base import (
    GATED_DENSE,
    Activation,
    Family,
    Group,
    K,
    Q,
    Stage,
    V,
)
from rsq_stream.output.verify import verify
from rsq_stream.pipeline.bit_allocation.measure import measure, sensitivity_plan
from rsq_stream.planning.machine_speed import MachineSpeed
from rsq_stream.planning.time_estimate import predict
from rsq_stream.planning.validate import inspect_checkpoint
from tests.evaluation.test_evaluation import WINDOWS, log_probabilities, loss_of
from tests.pipeline.test_repair import RUN, flip, goes_on, place_of, stopped
from tests.pipeline.test_resume import SMALL
from tests.support import textbook
from tests.support.dense import textbook_rotations
from tests.support.entries import family_config
from tests.support.toy import (
    calm,
    contents,
    decoded_state,
    execution_for,
    job_of,
    linear_names,
    open_toy,
    options_for,
    plan_toy,
    run_toy,
    toy_checkpoint,
)

SMOLLM3 = Family(
    model_type="smollm3",
    class_prefix="SmolLM3",
    bias_options=("attention_bias", "mlp_bias"),
)
NAMES = (*FAMILIES, "smollm3")
each_family = pytest.mark.parametrize("name", NAMES)


def keys_apart(config: Mapping[str, Any], block: int) -> tuple[Stage, ...]:
    """In every other block, solve k in a stage of its own, after q and v."""
    del config
    if block % 2 == 0:
        return GATED_DENSE
    first, *others = GATED_DENSE
    queries = dataclasses.replace(first, groups=(Group((Q, V)),))
    keys = Stage(
        name="attention keys",
        groups=(Group((K,)),),
        input=Activation.ATTENTION_INPUT,
        reads="x",
    )
    return (queries, keys, *others)


@pytest.fixture(autouse=True)
def smollm3() -> Iterator[None]:
    FAMILIES.add("smollm3", SMOLLM3)
    with calm():
        yield
    FAMILIES.remove("smollm3")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Three blocks of SmolLM3, the second of which has no positions."""
    return small_toy(tmp_path / "toy", "smollm3", no_rope_layer_interval=2)


def small_toy(folder: Path, name: str, **config: Any) -> Path:
    config = SMALL | family_config(name) | {"vocabulary": 128} | config
    return toy_checkpoint(folder, family=name, blocks=3, straddle=False, **config)


def part_keys() -> None:
    """Return SmolLM3 blocks of two kinds."""
    FAMILIES.remove("smollm3")
    FAMILIES.add("smollm3", dataclasses.replace(SMOLLM3, stages=keys_apart))


@each_family
def test_a_family_is_quantized_verified_and_loaded(tmp_path: Path, name: str) -> None:
    layers = {"no_rope_layer_interval": 2} if name == "smollm3" else {}
    source = small_toy(tmp_path / "toy", name, **layers)
    output = tmp_path / "out"
    run_toy(source, output, **RUN | {"bits": 8})
    found = verify(output, open_toy(source))
    assert found.problems == []
    assert set(found.weight_errors) == set(linear_names(3))
    ours = evaluate(open_toy(output), WINDOWS, against=open_toy(source))
    theirs = loss_of(log_probabilities(output, WINDOWS), WINDOWS)
    assert ours.loss == pytest.approx(theirs, rel=1e-5)
    before = loss_of(log_probabilities(source, WINDOWS), WINDOWS)
    assert ours.loss == pytest.approx(before, rel=0.01)
    assert ours.kl_divergence is not None
    assert 0 < ours.kl_divergence < 0.01


@each_family
def test_stopped_after_each_block_it_has_the_same_bytes(
    tmp_path: Path, name: str
) -> None:
    source = small_toy(tmp_path / "toy", name)
    run_toy(source, tmp_path / "whole", **RUN)
    for block in range(2):
        stop = threading.Event()

        def listener(event: Event, stop: threading.Event = stop) -> None:
            if isinstance(event, BlockFinished):
                stop.set()

        with pytest.raises(Interrupted, match=f"goes on after block {block + 1} of 3"):
            run_toy(source, tmp_path / "out", **RUN, listener=listener, stop=stop)
    assert run_toy(source, tmp_path / "out", **RUN).resumed_at == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@each_family
def test_its_weights_are_the_textbooks(tmp_path: Path, name: str) -> None:
    """A sum in another order may round one of many weights the other way, no more."""
    source = small_toy(tmp_path / "toy", name)
    settings: dict[str, Any] = {"bits": 8, "group_size": -1}
    run_toy(source, tmp_path / "out", **settings)
    plan, windows = plan_toy(source, **settings)
    assert windows is not None
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    rotations: dict[str, Any] = {
        **textbook_rotations(plan, inspect_checkpoint(open_toy(source)))
    }
    textbook.quantize_model(
        model,
        windows.window_BT.long(),
        method="rsq",
        bits=8,
        group_size=-1,
        **rotations,
        importance_min=plan.importance_min,
        signed=plan.signed_scales,
        exponent=plan.clip_exponent,
        steps=plan.clip_steps,
    )
    ours, theirs = decoded_state(tmp_path / "out"), model.state_dict()
    distances = [
        float((ours[name] - theirs[name]).norm() / theirs[name].norm())
        for name in (f"{linear}.weight" for linear in linear_names(3))
    ]
    assert statistics.median(distances) < 1e-5
    assert max(distances) < 5e-3


def test_blocks_of_two_kinds_have_the_weights_of_one(toy: Path, tmp_path: Path) -> None:
    """k reads what q and v read: its Hessian is the same, in whatever stage."""
    states = []
    for name in ("plain", "parted"):
        run_toy(toy, tmp_path / name, act_order=True)
        states.append(decoded_state(tmp_path / name))
        assert verify(tmp_path / name, open_toy(toy)).problems == []
        part_keys()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_blocks_of_two_kinds_go_on_after_each_stage(toy: Path, tmp_path: Path) -> None:
    part_keys()
    run_toy(toy, tmp_path / "whole", **RUN)
    for block, stage in (
        (0, "mlp out"),
        (1, "attention keys"),
        (1, "attention out"),
        (1, "mlp in"),
        (1, "mlp out"),
        (1, "outputs"),
        (2, "attention out"),
    ):
        stopped(toy, tmp_path / "out", block, stage)
    assert goes_on(toy, tmp_path / "out") == []
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert verify(tmp_path / "out", open_toy(toy)).problems == []


def test_damaged_codes_are_solved_again_from_the_stage_they_are_of(
    toy: Path, tmp_path: Path
) -> None:
    part_keys()
    run_toy(toy, tmp_path / "whole", **RUN)
    stopped(toy, tmp_path / "out", 1, "mlp in")
    (partial,) = (tmp_path / "out").glob("*.partial")
    flip(partial, place_of(partial, "model.layers.1.self_attn.k_proj.weight_packed"))
    (notice,) = goes_on(toy, tmp_path / "out")
    assert notice.endswith("from stage attention keys on")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_memory_and_time_are_planned_for_each_kind(toy: Path, tmp_path: Path) -> None:
    """A stage that k has for itself: what the run took, and what was planned."""
    rates = MachineSpeed(
        **{field.name: 1e9 for field in dataclasses.fields(MachineSpeed)}
    )
    seconds = []
    for name in ("plain", "parted"):
        plan, _ = plan_toy(toy)
        execution = execution_for(toy, plan, options_for(tmp_path / name))
        architecture = inspect_checkpoint(open_toy(toy))
        seconds.append(predict(architecture, plan, execution, rates, on_gpu=False))
        summary = run_toy(toy, tmp_path / name)
        planned = {stage.name: stage.host_bytes for stage in execution.stages}
        assert {stage.name for stage in summary.stages} == planned.keys()
        assert seconds[-1].stages.keys() == planned.keys()
        part_keys()
    plain, parted = (prediction.stages for prediction in seconds)
    solved = "attention in: solve k", "attention keys: solve k"
    assert parted[solved[1]] == pytest.approx(plain[solved[0]] / 3)
    assert parted[solved[0]] == pytest.approx(plain[solved[0]] * 2 / 3)
    assert 0 < parted["attention keys: pass"] < parted["attention in: pass"] / 2
    assert 0 < planned["attention keys: pass"] <= planned["attention in: pass"]


def test_bits_of_two_kinds_of_blocks_are_measured(toy: Path, tmp_path: Path) -> None:
    part_keys()
    plan, windows = plan_toy(toy)
    plan, options = sensitivity_plan(plan), options_for(tmp_path / "out")
    execution = execution_for(toy, plan, options)
    parts = {"plan": plan, "execution": execution, "options": options}
    costs = measure(job_of(open_toy(toy), **parts, windows=windows))
    assert set(costs) == set(linear_names(3))


def test_a_family_that_is_gone_is_named(toy: Path) -> None:
    FAMILIES.remove("smollm3")
    known = ", ".join(FAMILIES)
    message = f"model_type 'smollm3' is not supported; supported are {known}$"
    with pytest.raises(UnsupportedModelError, match=message):
        plan_toy(toy)
    FAMILIES.add("smollm3", SMOLLM3)


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys; from rsq_stream.model.families import FAMILIES; print(*FAMILIES);"
        " FAMILIES['llama']; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [name for name in FAMILIES if name != "smollm3"]
