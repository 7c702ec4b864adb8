"""Units that stay in memory take their size there, and no more."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

from rsq_stream.events import Event, StageStarted
from tests.support.toy import contents, run_toy, toy_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WIDTH, SAMPLES, TOKENS = 256, 2048, 256
SLOT_BYTES = SAMPLES * TOKENS * WIDTH * 2
PLAN = {"unit_sequences": 8, "hessian_panel": 128, "tile_columns": 128}


def child() -> None:
    """Quantize with all units in memory; says what the pass that keeps x' added."""
    folder, output = map(Path, sys.argv[1:])
    before: list[int] = []
    most, ended = [0], threading.Event()

    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch)

    def listener(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "outputs":
            before.append(resident())
            watcher.start()

    run_toy(
        folder,
        output,
        listener=listener,
        method="gptq",
        samples=SAMPLES,
        sequence_length=TOKENS,
        plan=PLAN,
        options={"workers": 2, "ram_bytes": 64 << 30},
    )
    ended.set()
    watcher.join()
    sys.stdout.write(str(most[0] - before[0]))


@pytest.mark.slow
def test_units_in_memory_take_their_size(disk_folder: Path) -> None:
    """In the heap they take three times as much: what passes allocate lies between."""
    toy = toy_checkpoint(
        disk_folder / "toy",
        width=WIDTH,
        heads=4,
        kv_heads=4,
        mlp=768,
        blocks=1,
        shards=1,
        dtype=torch.bfloat16,
        straddle=False,
    )
    program = "from tests.runtime.test_resident_units import child; child()"
    arguments = [str(toy), str(disk_folder / "out")]
    made = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert SLOT_BYTES == 256 << 20
    # Units in flight take some 100 MiB besides.
    assert int(made.stdout) < 1.75 * SLOT_BYTES


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_stays_in_memory_decides_no_byte(tmp_path: Path, family: str) -> None:
    """None, some and all units; qwen3's c is wider than x."""
    toy = toy_checkpoint(tmp_path / "toy", family=family, head_dim=32)
    made = []
    for resident in (0, 2, 3):
        output = tmp_path / f"out-{resident}"
        execution = {"resident_units": resident, "in_flight": 2}
        run_toy(toy, output, method="rsq", propagate=0.5, execution=execution)
        made.append(contents(output))
    assert made[0] == made[1] == made[2]
