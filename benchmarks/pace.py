"""How long a block took on a GPU, and what it could not have been faster than.

    python benchmarks/pace.py MODEL SHAPE < RUN.json

``shapes.py`` runs it on what ``watched_run.py`` found. MODEL lies on the disk that
the run used; its rates are measured there.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rsq_stream.model.architecture import read_architecture
from rsq_stream.storage.atomic import sync_file
from rsq_stream.storage.direct_io import (
    aligned_empty,
    has_direct_io,
    read_chunk,
    write_chunk,
)

BLOCKS = {"8B": 32, "70B": 80, "405B": 126}
OUTSIDE = "embedding and head"
_RAW_BYTES = 512 << 20
_WORTH_A_LINE = 0.01
"""Of the run, what a kernel takes in a stage."""


def disk_rates(folder: Path) -> tuple[float, float]:
    """Return bytes a second that a file is read and durably written with, raw."""
    direct, path = has_direct_io(folder), folder / "raw"
    content = aligned_empty(_RAW_BYTES)
    content.fill(1)
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        write_chunk(path, content, direct=direct)
        sync_file(path)
        middle = time.perf_counter()
        read_chunk(path, _RAW_BYTES, direct=direct)
        spent.append((time.perf_counter() - middle, middle - began))
    path.unlink()
    read_s, written_s = (min(each) for each in zip(*spent, strict=True))
    return _RAW_BYTES / read_s, _RAW_BYTES / written_s


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a block took, and what it could not have been faster than."""

    block_s: float
    outside_s: float
    compute_s: float
    """The GPU had work."""
    moved_bytes: int
    """Read and written in a block: activations that are not in memory, and shards."""
    disk_s: float

    @property
    def floor_s(self) -> float:
        """Return the longer of compute and disk."""
        return max(self.compute_s, self.disk_s)


def pace_of(
    made: dict[str, Any], config: dict[str, Any], read: float, written: float
) -> Pace:
    """Return a run's pace; the disk reads and writes so many bytes a second.

    A block's passes read five slots of each stream and write two, durably.
    """
    plan, execution = made["plan"], made["execution"]
    stages = {name: row["measured_s"] for name, row in made["stages"].items()}
    outside_s = stages.pop(OUTSIDE)
    busy_s = sum(made["busy"].get(name, 0.0) * s for name, s in stages.items())
    streams, slot = execution["slots"] // 3, execution["slot_bytes"]
    units = -(-plan["samples"] * plan["expand"] // plan["unit_sequences"])
    on_disk = 1 - execution["resident_units"] / units
    architecture = read_architecture(config, "here")
    blocks, sizes = architecture.blocks, architecture.block_shapes(0)
    weights = sum(map(prod, sizes.values()))
    reads = int(5 * streams * slot * on_disk) + 2 * weights
    writes = 2 * streams * slot + weights * plan["bits"] // 8
    return Pace(
        block_s=sum(made["block_s"]) / blocks,
        outside_s=outside_s,
        compute_s=busy_s / blocks,
        moved_bytes=reads + writes,
        disk_s=reads / read + writes / written,
    )


def report_pace(made: dict[str, Any], pace: Pace, shape: str) -> None:
    """Print what a block takes, against its floor, and what the whole model would."""
    print(f"a block: {pace.block_s:.1f} s, of which the GPU had work", end=" ")
    print(f"{pace.compute_s:.1f} s ({pace.compute_s / pace.block_s:.0%})")
    if "kernel_s" in made:
        share = made["kernel_s"] / made["seconds"]
        print(f"kernels alone: {made['kernel_s']:.1f} s of the run, {share:.0%}")
    print(f"disk: {pace.moved_bytes / 2**30:.2f} GiB, {pace.disk_s:.1f} s at its rate")
    ratio = pace.block_s / max(pace.floor_s, 1e-9)
    print(f"a block takes {ratio:.2f} of the longer of compute and disk")
    whole_s = pace.outside_s + BLOCKS[shape] * pace.block_s
    print(f"{BLOCKS[shape]} blocks, embedding and head: {whole_s / 3600:.2f} hours")


def report_kernels(made: dict[str, Any]) -> None:
    """Print the kernels that took a hundredth of the run, in a stage or in all."""
    if "kernels" not in made:
        return
    least_s = _WORTH_A_LINE * made["seconds"]
    totals, times = Counter[str](), Counter[str]()
    print("\n| stage | kernel | s | times |\n|---|---|---|---|")
    for stage, name, seconds, count in made["kernels"]:
        totals[name] += seconds
        times[name] += count
        if seconds >= least_s:
            print(f"| {stage} | {name[:90]} | {seconds:.2f} | {count} |")
    for name, seconds in totals.most_common():
        if seconds >= least_s:
            print(f"| all | {name[:90]} | {seconds:.2f} | {times[name]} |")


def main() -> None:
    """Read what a run was, measure the disk, print both."""
    model, shape = Path(sys.argv[1]), sys.argv[2]
    made = json.load(sys.stdin)
    config = json.loads((model / "config.json").read_text())
    report_pace(made, pace_of(made, config, *disk_rates(model.parent)), shape)
    report_kernels(made)


if __name__ == "__main__":
    main()
