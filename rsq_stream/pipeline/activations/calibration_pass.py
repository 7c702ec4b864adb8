"""One pass over the units of the calibration set: many in flight, results in order.

What is computed per unit does not depend on how many are in flight, and results
are taken in the units' order: so neither budget nor workers change a bit.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from rsq_stream.errors import BudgetError, Interrupted
from rsq_stream.events import Listener, Notice, StageStarted, UnitsDone
from rsq_stream.pipeline.stage_profile import StageProfiler
from rsq_stream.runtime.device_memory import give_back_device_memory
from rsq_stream.runtime.host_memory import trim_heap
from rsq_stream.runtime.worker_pool import Pool
from rsq_stream.storage.activation_cache import Slot

Result = TypeVar("Result")


@dataclass(kw_only=True)
class CalibrationPasses:
    """How passes are run: threads, units in flight, who listens, who may stop."""

    pool: Pool
    in_flight: int
    listener: Listener
    stop: threading.Event
    profiler: StageProfiler = field(default_factory=StageProfiler)

    def run(
        self,
        slots: Sequence[Slot],
        block: int,
        stage: str,
        function: Callable[..., Result],
    ) -> Iterator[list[tuple[int, Result]]]:
        """Apply a function to (unit, activations of each slot); gives runs of results.

        A run is there until the next is asked for, and is emptied then.

        Raises
        ------
        Interrupted
            The stop event was set; nothing that was finished is lost.
        """
        units = slots[0].shape.units
        trim_heap()
        self.listener(StageStarted(block=block, stage=stage, units=units))
        readers = [slot.arriving(range(units), self.in_flight) for slot in slots]
        reads = zip(*readers, strict=True)
        for first in range(0, units, self.in_flight):
            self.check()
            run = range(first, min(first + self.in_flight, units))
            items = [(unit, *next(reads)) for unit in run]
            tokens = sum(item[1].shape[0] * item[1].shape[1] for item in items)
            results = self.pool.map(lambda item: function(*item), items)
            made = list(zip(run, results, strict=True))
            del items, results
            yield made
            # Whoever takes it holds the list while the next one is made.
            made.clear()
            self.listener(
                UnitsDone(block=block, stage=stage, units=len(run), tokens=tokens)
            )

    def retry_with_fewer(self, work: Callable[[], Result], where: str) -> Result:
        """Do work whose passes may be too much for the GPU: again, with fewer units.

        Half as many each time, and from then on: what is done twice is the same.

        Raises
        ------
        BudgetError
            Not even one unit at a time fits.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if self.in_flight == 1:
                    raise BudgetError(
                        f"{where}: memory ran out with one unit in flight; free some of"
                        " it, or give a larger --vram: the same command goes on"
                    ) from error
                self.in_flight //= 2
            # Only now is what the failed attempt held free.
            give_back_device_memory()
            text = f"{where}: memory ran out; {self.in_flight} units in flight from now"
            self.listener(Notice(text=text))

    def checked(self, items: Iterable[Result]) -> Iterator[Result]:
        """Yield items one by one; stop between two if a stop was asked for."""
        for item in items:
            self.check()
            yield item

    def check(self) -> None:
        """Stop here if somebody asked for it."""
        stopper(self.stop)()


def stopper(stop: threading.Event) -> Callable[[], None]:
    """Return a check that raises once a stop was asked for."""

    def check() -> None:
        if stop.is_set():
            raise Interrupted("stopped")

    return check
