"""Renders the pipeline's events on stderr: a live line on a terminal, else lines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rsq_stream.events import (
    BlockFinished,
    Event,
    LinearRecord,
    Listener,
    Notice,
    RunStarted,
    StageStarted,
    UnitsDone,
    ignore,
)

from .text import duration, linear_kind, remark


class Pace:
    """What the events say about speed; knows nothing of how it is shown."""

    def __init__(self) -> None:
        self.blocks = 0
        self.done = 0
        self._began = time.monotonic()
        self._first = 0
        self._stage_began = self._began
        self._stage_tokens = 0

    def take(self, event: Event) -> None:
        """Count what an event tells."""
        now = time.monotonic()
        if isinstance(event, RunStarted):
            self.blocks, self._began = event.blocks, now
            self._first = self.done = event.first_block
        elif isinstance(event, StageStarted):
            # Where no block is reported finished, the next one's start tells.
            self.done = event.block
            self._stage_began, self._stage_tokens = now, 0
        elif isinstance(event, UnitsDone):
            self._stage_tokens += event.tokens
        elif isinstance(event, BlockFinished):
            self.done = event.block + 1

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second through the present stage."""
        return self._stage_tokens / max(1e-9, time.monotonic() - self._stage_began)

    @property
    def left_s(self) -> float | None:
        """Seconds that the blocks still to do will take, from those of this run."""
        here = self.done - self._first
        if not here or not self.blocks:
            return None
        return (time.monotonic() - self._began) / here * (self.blocks - self.done)


def worst_of(records: tuple[LinearRecord, ...]) -> str:
    """Name the linear that lost most: ``worst down_proj 0.0412``."""
    worst = max(records, key=lambda made: made.relative_error)
    return f"worst {linear_kind(worst.name)} {worst.relative_error:.4f}"


def announce(event: Event) -> None:
    """Write notices and warnings to stderr, and nothing else."""
    if isinstance(event, Notice):
        remark(_kind(event), event.text)


def _kind(event: Notice) -> str:
    return "warning" if event.is_warning else "notice"


class Lines:
    """One plain line per block, for logs and pipes."""

    def __init__(self) -> None:
        self._pace = Pace()

    def __call__(self, event: Event) -> None:
        """Render one event."""
        self._pace.take(event)
        if isinstance(event, RunStarted) and event.first_block:
            remark("notice", _going_on(event))
        elif isinstance(event, Notice):
            announce(event)
        elif isinstance(event, BlockFinished):
            left = self._pace.left_s
            parts = [
                f"block {event.block + 1}/{self._pace.blocks}",
                f"{event.seconds:.1f} s",
            ]
            if event.records:
                parts.append(worst_of(event.records))
            if left is not None and self._pace.done < self._pace.blocks:
                parts.append(f"ETA {duration(left)}")
            sys.stderr.write("  ".join(parts) + "\n")
            sys.stderr.flush()


class LiveLine:
    """A bar of blocks and one line about the present stage, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._pace = Pace()
        self._stage, self._units, self._units_done = "reading", 0, 0
        self._last = ""
        self._bar = Progress(
            TextColumn("block {task.fields[block]}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True),
            ),
            console=Console(stderr=True),
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, block="")
        self._bar.start()

    def close(self) -> None:
        """Take the line away."""
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Render one event."""
        self._pace.take(event)
        if isinstance(event, Notice):
            self._bar.console.print(f"{_kind(event)}: {event.text}", markup=False)
        elif isinstance(event, RunStarted) and event.first_block:
            self._bar.console.print(f"notice: {_going_on(event)}", markup=False)
        elif isinstance(event, StageStarted):
            self._stage, self._units, self._units_done = event.stage, event.units, 0
        elif isinstance(event, UnitsDone):
            self._units_done += event.units
        elif isinstance(event, BlockFinished):
            self._last = worst_of(event.records) if event.records else ""
            self._stage, self._units, self._units_done = "reading", 0, 0
        self._show()

    def _show(self) -> None:
        pace = self._pace
        parts = [self._stage]
        if self._units:
            parts[0] += f" {self._units_done}/{self._units}"
        if self._units_done:
            parts.append(f"{pace.tokens_per_s:,.0f} tokens/s")
        if (left := pace.left_s) is not None:
            parts.append(f"ETA {duration(left)}")
        if self._last:
            parts.append(self._last)
        self._bar.update(
            self._task,
            total=pace.blocks or None,
            completed=pace.done,
            block=f"{min(pace.done + 1, pace.blocks)}/{pace.blocks}",
            description="  ".join(parts),
        )


@contextmanager
def shown(*, silent: bool) -> Iterator[Listener]:
    """Return a listener that renders on stderr, or one that does nothing."""
    if silent:
        yield ignore
    elif sys.stderr.isatty():
        live = LiveLine()
        try:
            yield live
        finally:
            live.close()
    else:
        yield Lines()


def _going_on(event: RunStarted) -> str:
    return f"going on after block {event.first_block} of {event.blocks}"
