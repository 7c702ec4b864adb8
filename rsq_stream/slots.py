"""Where the activations of a run lie: a block's input, h in between, its output.

Inputs and outputs of successive blocks take turns in two slots; h has a third.
None is overwritten while a resumed run may still need it: a block's input lives
until the block is journalled, h until the next block's third stage.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from rsq_stream.config import ExecutionPlan, QuantizationPlan
from rsq_stream.events import Listener, Notice
from rsq_stream.storage import atomic
from rsq_stream.storage.activations import Slot, SlotShape, has_direct_io


@dataclass(frozen=True)
class Slots:
    """The slots of one block."""

    x: Slot
    h: Slot
    x_next: Slot
    resident: int
    """Units whose attention output stays in memory; others compute it again."""


class RunSlots:
    """The three slots of a run, in its work folder."""

    def __init__(
        self,
        plan: QuantizationPlan,
        width: int,
        execution: ExecutionPlan,
        work_dir: Path,
        listener: Listener,
    ) -> None:
        self.shape = slot_shape(plan, width)
        with atomic.explained(work_dir):
            direct = has_direct_io(work_dir)
        if not direct:
            text = f"{work_dir}: no direct I/O here, so writes are buffered and fsynced"
            listener(Notice(text=text))
        self._resident = execution.resident_units
        self._turns = [
            Slot(
                work_dir / name,
                self.shape,
                self._resident,
                execution.in_flight,
                direct=direct,
            )
            for name in ("even", "odd", "h")
        ]

    def input_of(self, block: int) -> Slot:
        """Give the slot that holds a block's input; a block's output is the next's."""
        return self._turns[block % 2]

    @property
    def h(self) -> Slot:
        """The slot between attention and MLP."""
        return self._turns[2]

    def of_block(self, block: int) -> Slots:
        """Give a block's slots."""
        return Slots(
            x=self.input_of(block),
            h=self.h,
            x_next=self.input_of(block + 1),
            resident=self._resident,
        )

    def close(self) -> None:
        """Stop the threads that read and write."""
        for slot in self._turns:
            slot.close()


def slot_shape(plan: QuantizationPlan, width: int) -> SlotShape:
    """Give the shape of a run's slots."""
    return SlotShape(
        sequences=plan.sequences,
        tokens=plan.sequence_length,
        width=width,
        unit_sequences=plan.unit_sequences,
        dtype=getattr(torch, plan.cache_type),
    )
