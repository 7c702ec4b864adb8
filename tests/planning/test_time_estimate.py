"""Seconds predicted from counts and rates, and what a run says it took."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rsq_stream.demo import MODEL
from rsq_stream.pipeline.stage_profile import StageProfiler, StageUsage, added_up
from rsq_stream.planning.machine_speed import MachineSpeed, measure_speed
from rsq_stream.planning.time_estimate import Prediction, predict
from rsq_stream.planning.validate import inspect_checkpoint
from tests.support.cli_runs import SMALL, Run
from tests.support.toy import execution_for, open_toy, options_for, plan_toy

NEVER = {field.name: math.inf for field in dataclasses.fields(MachineSpeed)}
"""Rates of a machine that takes no time for anything."""
SETTINGS: dict[str, Any] = {
    "method": "rsq",
    "samples": 4,
    "sequence_length": 64,
    "group_size": 64,
    "propagate": 0.5,
    "sweeps": 2,
    "refit": True,
}


def predicted(tmp_path: Path, rates: dict[str, float]) -> Prediction:
    plan, _ = plan_toy(MODEL, **SETTINGS)
    checkpoint = open_toy(MODEL)
    made = execution_for(MODEL, plan, options_for(tmp_path / "out"))
    made = dataclasses.replace(made, resident_units=plan.units)
    architecture = inspect_checkpoint(checkpoint)
    return predict(architecture, plan, made, MachineSpeed(**rates), on_gpu=False)


def test_factorisation_by_hand(tmp_path: Path) -> None:
    rates = NEVER | {"products": 1e9, "factored": 1e6}
    found = predicted(tmp_path, rates).stages
    config = json.loads((MODEL / "config.json").read_text())
    blocks, mlp = config["num_hidden_layers"], config["intermediate_size"]
    wanted = blocks * (mlp**3 / 3 / 1e9 + mlp**2 / 1e6)
    assert found["mlp out: factorise"] == pytest.approx(wanted)


def test_solving_by_hand(tmp_path: Path) -> None:
    """Products: the sweep, three losses, two rounds of two, two triangular solves."""
    found = predicted(tmp_path, NEVER | {"products": 1e9, "weights": 1e6}).stages
    config = json.loads((MODEL / "config.json").read_text())
    blocks, mlp = config["num_hidden_layers"], config["intermediate_size"]
    width = config["hidden_size"]
    flops = (1 + 3 + 2 * 2 + 2) * width * mlp**2
    wanted = blocks * (flops / 1e9 + width * mlp / 1e6)
    assert found["mlp out: solve down"] == pytest.approx(wanted)


def test_a_slow_disk_hides_the_rest(tmp_path: Path) -> None:
    """Outputs of both streams are written; what they are made from is in memory."""
    found = predicted(tmp_path, NEVER | {"products": 1e12, "written": 1.0}).stages
    config = json.loads((MODEL / "config.json").read_text())
    written = 2 * 4 * 64 * config["hidden_size"] * 2
    blocks = config["num_hidden_layers"]
    assert found["outputs: pass"] == pytest.approx(blocks * written)
    assert found["mlp in: pass"] == pytest.approx(blocks * written)
    assert found["mlp out: pass"] < 1


def test_rates_are_measured_quickly(tmp_path: Path) -> None:
    plan, _ = plan_toy(MODEL, **SETTINGS)
    began = time.monotonic()
    found = measure_speed(plan, torch.device("cpu"), 2, tmp_path)
    assert time.monotonic() - began < 15  # 3 s, on a machine that is not busy
    for name, rate in dataclasses.asdict(found).items():
        assert 0 < rate < math.inf, name
    assert list(tmp_path.iterdir()) == []
    nowhere = measure_speed(plan, torch.device("cpu"), 2, tmp_path / "absent")
    assert nowhere.written == nowhere.read == math.inf


def test_a_stage_is_measured() -> None:
    profiler = StageProfiler(torch.device("cpu"))
    try:
        with profiler.stage("large"):
            large = torch.ones(32 << 20, dtype=torch.uint8)
            time.sleep(0.05)
        del large
        with pytest.raises(ValueError, match="no"), profiler.stage("failed"):
            raise ValueError("no")
        with profiler.stage("small"):
            pass
    finally:
        profiler.close()
    first, second = profiler.unjournalled()
    assert profiler.unjournalled() == []
    assert (first.name, second.name) == ("large", "small")
    assert first.seconds > 0.05
    assert first.host_bytes > 32 << 20
    assert first.device_bytes == 0


def test_stages_are_added_up() -> None:
    taken = [StageUsage("a", 1.0, 5, 0), StageUsage("b", 2.0, 1, 1)]
    found = added_up([*taken, StageUsage("a", 0.5, 3, 2)])
    assert found == (StageUsage("a", 1.5, 5, 2), StageUsage("b", 2.0, 1, 1))


def test_a_run_says_what_its_stages_took(run: Run, tmp_path: Path) -> None:
    arguments = (MODEL, "--bits", "3", *SMALL, "--output", tmp_path / "out")
    code, out, err = run("plan", *arguments, "--json")
    assert code == 0, err
    planned = json.loads(out)
    assert planned["predicted_seconds"] > 0
    code, out, err = run("quantize", *arguments, "--json")
    assert code == 0, err
    found = json.loads(out)["stages"]
    assert list(found) == [made["name"] for made in planned["execution"]["stages"]]
    for row in found.values():
        assert row["measured_s"] > 0
        assert row["predicted_s"] > 0
        # The planner promises that this is enough.
        assert 0 < row["measured_host_bytes"] <= row["predicted_host_bytes"]
        assert row["predicted_device_bytes"] == row["measured_device_bytes"] == 0
