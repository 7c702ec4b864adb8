"""Run rsq-stream and watch the GPU meanwhile; ``shapes.py`` starts it.

    python benchmarks/watched_run.py [--kernels] [--limit 2GiB] -- COMMAND ...

The last line of stderr is JSON: bytes written, the seconds of each block, and by stage
(as the memory plan has them) how often the GPU had work when it was looked at. Looking
asks the compute stream whether it is done, 500 times a second, and waits for nothing.
Compute that is held until a copy arrives counts as work: ``--kernels`` has the
profiler add up the times of kernels themselves, in all and by stage and name, which
takes some GiB of host memory.
``--limit`` has the kernel refuse memory beyond it (``shapes.py`` says how).
"""

import argparse
import json
import resource
import sys
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from rsq_stream.cli.main import main
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import rsq_stream.pipeline.bit_allocation.choose_bits
import rsq_stream.pipeline.quantize
import rsq_stream.planning.execution_plan  # noqa: F401  all that a run imports counts before its limit
from rsq_stream.config.run_options import parse_size
from rsq_stream.pipeline.stage_profile import StageProfiler
from rsq_stream.storage.journal import Journal, Progress

EVERY_S = 0.002
_COPIES = ("Memcpy", "Memset")


class Watch:
    """Looks at the compute stream, in a thread of its own."""

    def __init__(self) -> None:
        self.stage = ""
        self.looks: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        # Not before somebody computes: a context costs memory.
        while torch.cuda.is_available() and not self._ended.wait(EVERY_S):
            if torch.cuda.is_initialized() and self.stage:
                stage = self.stage
                self.looks[stage] += 1
                self.busy[stage] += not torch.cuda.default_stream().query()

    def shares(self) -> dict[str, float]:
        """Stop, and give the share of looks at which a stage had work."""
        self._ended.set()
        self._thread.join()
        return {stage: self.busy[stage] / n for stage, n in self.looks.items()}


def follow_stages(watch: Watch) -> list[tuple[str, int, int]]:
    """Tell the watch which stage it is; gives a list that gets their spans, in ns."""
    known, spans = StageProfiler.stage, []

    @contextmanager
    def stage(self: StageProfiler, name: str) -> Iterator[None]:
        watch.stage, began = name, time.time_ns()
        try:
            with known(self, name):  # its end waits for the GPU
                yield
        finally:
            watch.stage = ""
            spans.append((name, began, time.time_ns()))

    StageProfiler.stage = stage  # type: ignore[method-assign]
    return spans


def follow_blocks() -> list[float]:
    """Return a list that gets the seconds of each block, between stages too."""
    known, found = Journal.finish_block, []

    def finish_block(
        self: Journal, block: int, progress: Progress, *, seconds: float, **rest: Any
    ) -> None:
        known(self, block, progress, seconds=seconds, **rest)
        if block >= 0:
            found.append(seconds)

    Journal.finish_block = finish_block  # type: ignore[method-assign]
    return found


def union_s(spans_ns: Iterable[tuple[int, int]]) -> float:
    """Return the seconds that spans of (start, length) cover, overlaps once."""
    covered, end = 0, 0
    for start, length in sorted(spans_ns):
        covered += max(0, start + length - max(start, end))
        end = max(end, start + length)
    return covered / 1e9


def kernel_seconds(events: Iterable[Any]) -> float:
    """Add up what the profiler saw of kernels; copies are no compute."""
    return union_s(
        (event.start_ns(), event.duration_ns())
        for event in events
        if not event.name().startswith(_COPIES)
    )


def by_name(
    events: Iterable[Any], spans: list[tuple[str, int, int]]
) -> list[tuple[str, str, float, int]]:
    """Add up kernels and copies by stage and name: seconds, and how many."""
    spent, times = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    spans = sorted(spans, key=lambda span: span[1])
    starts = [began for _, began, _ in spans]
    for event in events:
        at = bisect_right(starts, event.start_ns()) - 1
        inside = at >= 0 and event.start_ns() < spans[at][2]
        key = spans[at][0] if inside else "", event.name()
        spent[key] += event.duration_ns() / 1e9
        times[key] += 1
    return [(*key, seconds, times[key]) for key, seconds in spent.most_common()]


def limit_memory(ram: str) -> None:
    """Set RLIMIT_DATA to what there is by now, what is left of ``ram``, and 384 MiB."""
    kept = Path("/proc/self/status").read_text().split()
    data, resident = (
        int(kept[kept.index(key) + 1]) << 10 for key in ("VmData:", "VmRSS:")
    )
    limit = data + parse_size("--ram", ram) - resident + (384 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--limit")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    watch = Watch()
    spans = follow_stages(watch) if torch.cuda.is_available() else []
    block_s = follow_blocks()
    profiled = (
        profile(activities=[ProfilerActivity.CUDA]) if given.kernels else nullcontext()
    )
    if given.limit:
        limit_memory(given.limit)
    try:
        with profiled as seen:
            main(given.command)
    finally:
        found: dict[str, Any] = {
            "written_bytes": psutil.Process().io_counters().write_bytes,
            "busy": watch.shares(),
            "block_s": block_s,
        }
        if given.kernels:
            events = [
                event
                for event in seen.profiler.kineto_results.events()
                if event.device_type() == DeviceType.CUDA
            ]
            found["kernel_s"] = kernel_seconds(events)
            found["kernels"] = by_name(events, spans)
        print(json.dumps(found), file=sys.stderr)
