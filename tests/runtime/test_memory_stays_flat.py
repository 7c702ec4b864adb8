"""Host memory does not grow with the calibration set: the promise, measured."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rsq_stream.planning.execution_plan import plan_execution
from rsq_stream.planning.validate import inspect_checkpoint
from tests.support.toy import (
    contents,
    open_toy,
    options_for,
    plan_toy,
    run_toy,
    toy_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]
TOKENS, WIDTH = 512, 256
FEW, MANY = 512, 2560
"""Even the few are 128 units a pass: the allocator is then as full as it gets."""
SEQUENCE_BYTES = TOKENS * WIDTH * 2
PLAN = {
    "unit_sequences": 4,
    "hessian_panel": 128,
    "tile_columns": 128,
    "tile_rows": 128,
    "shard_bytes": 4_000_000_000,
}
SLACK_BYTES = 16 << 20
"""What the budget has above the planner's least: less than a slot of the few."""
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
"""Has glibc map each tensor by itself. What its heap keeps between small objects
differs by some 50 MB from run to run; what a run holds does not."""


@dataclass(frozen=True)
class Peak:
    """Highest memory of a process, its own and with the files it maps."""

    anonymous: int
    resident: int


def child() -> None:
    """Quantize in a process of its own: folder, output, samples, budget or 0."""
    folder, output, samples, ram = sys.argv[1:]
    flight: dict[str, Any] = {"workers": 2, "units_in_flight": 4}
    options = options_for(Path(output), **flight)
    fields: dict[str, Any] = {"samples": int(samples), "sequence_length": TOKENS}
    fields |= {"method": "rsq", "plan": PLAN}
    fields |= {"propagate": 0.5, "sweeps": 2, "refit": True}
    if ram == "least":
        plan, _ = plan_toy(Path(folder), **fields)
        checkpoint = open_toy(Path(folder))
        architecture = inspect_checkpoint(checkpoint)
        made = plan_execution(checkpoint, architecture, plan, options)
        used = psutil.Process().memory_info().rss
        ram = str(used + made.working_bytes + SLACK_BYTES)
    run_toy(
        Path(folder),
        Path(output),
        options={**flight, "ram_bytes": int(ram)},
        **fields,
    )
    sys.stdout.write(ram)


def run(
    folder: Path, output: Path, samples: int, ram: str, **variables: str
) -> tuple[Peak, int]:
    """Quantize in another process; gives its peak and the budget it had."""
    program = "from tests.runtime.test_memory_stays_flat import child; child()"
    arguments = [str(folder), str(output), str(samples), ram]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    status, highest = Path(f"/proc/{process.pid}/status"), {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        for line in status.read_text().splitlines():
            key, _, value = line.partition(":")
            if key in highest:
                highest[key] = max(highest[key], int(value.split()[0]) * 1024)
        time.sleep(0.02)
    said, _ = process.communicate()
    assert process.returncode == 0
    return Peak(highest["RssAnon"], highest["VmHWM"]), int(said)


@pytest.fixture(scope="module")
def toy(disk_folder: Path) -> Path:
    return toy_checkpoint(
        disk_folder / "toy",
        width=WIDTH,
        heads=1,
        kv_heads=1,
        mlp=32,
        dtype=torch.bfloat16,
        head_dim=32,
        max_position_embeddings=TOKENS,
    )


@pytest.fixture(scope="module")
def peaks(toy: Path) -> tuple[Peak, Peak, int]:
    """Peaks with few and with many samples, and the budget of both."""
    few, ram = run(toy, toy.with_name("few"), FEW, "least", **MAPPED)
    many, _ = run(toy, toy.with_name("many"), MANY, str(ram), **MAPPED)
    return few, many, ram


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
    ),
]


def test_memory_does_not_grow_with_the_samples(peaks: tuple[Peak, Peak, int]) -> None:
    few, many, ram = peaks
    added = (MANY - FEW) * SEQUENCE_BYTES
    assert added > 500_000_000
    growth = many.anonymous - few.anonymous
    assert growth < 0.05 * added, f"{few}, {many}, budget {ram}"


def test_memory_stays_within_the_budget(peaks: tuple[Peak, Peak, int]) -> None:
    few, many, ram = peaks
    assert max(few.resident, many.resident) <= ram


def test_memory_decides_no_byte(toy: Path, disk_folder: Path) -> None:
    small, ram = run(toy, disk_folder / "small", 256, "least")
    large, _ = run(toy, disk_folder / "large", 256, str(64 << 30))
    assert contents(disk_folder / "small") == contents(disk_folder / "large")
    assert small.resident <= ram
    # Three slots in memory, less what may stay there in the small run.
    assert large.anonymous - small.anonymous > 2 * 256 * SEQUENCE_BYTES
