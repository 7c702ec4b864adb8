"""Where the activations of a run lie: a block's input, h in between, its output.

Inputs and outputs of successive blocks take turns in two slots; h has a third.
None is overwritten while a resumed run may still need it: a block's input lives
until the block is journalled, h until the next block writes its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsq_stream.calibration.windows import Windows
from rsq_stream.events import Listener, Notice
from rsq_stream.pipeline.job import Job
from rsq_stream.runtime.copy_stream import CopyStream, SideStream
from rsq_stream.runtime.transfers import ToDevice, ToHost, Transfers
from rsq_stream.storage import atomic
from rsq_stream.storage.activation_cache import Slot
from rsq_stream.storage.activation_shape import slot_shape
from rsq_stream.storage.direct_io import has_direct_io
from rsq_stream.storage.journal import Journal

TURNS = ("even", "odd", "h")


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The slots of one block."""

    x: Slot
    h: Slot
    x_next: Slot
    resident: int
    """Units whose attention output stays in memory; others compute it again."""
    cached_mlp_units: int
    """The same of the MLP's inner activation."""


STREAMS = ("", "full-")
"""What the folders of a stream begin with: the quantized, the full-precision one."""


class RunSlots:
    """The slots of a run in its work folder: three for each of its streams."""

    def __init__(
        self, job: Job, *, listener: Listener, work_dir: Path | None = None
    ) -> None:
        """Lay them out in a folder: the job's work folder, if no other is given.

        Those of a run on a GPU are read and written beside its compute.
        """
        plan, execution = job.plan, job.execution
        work_dir = work_dir or job.options.work_dir
        device = torch.device(job.options.device)
        self.shape = slot_shape(plan, job.architecture.width)
        with atomic.error_context(work_dir):
            direct = has_direct_io(work_dir)
        if not direct:
            text = f"{work_dir}: no direct I/O here, so writes are buffered and fsynced"
            listener(Notice(text=text))
        self._resident = execution.resident_units
        self._mlp_units = execution.cached_mlp_units
        sizes = self.shape.unit_bytes, execution.in_flight
        self._transits = [
            Transfers(ToDevice(come, *sizes), ToHost(go, *sizes))
            for _ in range(plan.streams)
            if (come := copy_stream(device)) and (go := copy_stream(device))
        ]
        ways: Sequence[Transfers | None] = self._transits or [None] * plan.streams
        self._streams = [
            [
                Slot(
                    work_dir / f"{stream}{name}",
                    self.shape,
                    self._resident,
                    execution.in_flight,
                    direct=direct,
                    transit=transit,
                )
                for name in TURNS
            ]
            for stream, transit in zip(STREAMS, ways, strict=False)
        ]

    def inputs_of(self, block: int) -> list[Slot]:
        """Return each stream's slot with a block's input, the output of the last."""
        return [turns[block % 2] for turns in self._streams]

    def checksums_of(self, block: int) -> dict[str, dict[int, int]]:
        """Return the checksums of a block's input, by the names of its slots."""
        return {slot.folder.name: slot.checksums for slot in self.inputs_of(block)}

    def expect_inputs_of(self, block: int, journal: Journal) -> None:
        """Take a block's input as an earlier process journalled it."""
        for slot in self.inputs_of(block):
            slot.checksums = journal.chunks(slot.folder.name)

    def release_inputs_of(self, block: int) -> None:
        """Let go of the memory of a finished block's input, long before its next turn.

        It stays on disk: to make a damaged output again takes it.
        """
        for slot in self.inputs_of(block):
            slot.release()

    def of_block(self, block: int) -> list[Slots]:
        """Return a block's slots, by stream."""
        return [
            Slots(
                x=turns[block % 2],
                h=turns[2],
                x_next=turns[(block + 1) % 2],
                # To bring it from the host would take a GPU as long as to compute it,
                # and would be waited for.
                resident=0 if self._transits else self._resident,
                cached_mlp_units=self._mlp_units,
            )
            for turns in self._streams
        ]

    def close(self) -> None:
        """Stop the threads that read and write."""
        for transit in self._transits:
            transit.inbound.close()
        for turns in self._streams:
            for slot in turns:
                slot.close()


def copies_aside(device: torch.device) -> bool:
    """Whether there is something to gain from copies beside the compute."""
    return device.type == "cuda"


def copy_stream(device: torch.device) -> CopyStream | None:
    """Return a stream for copies to or from a GPU; none where the host computes."""
    return SideStream(device) if copies_aside(device) else None


def embed(
    slots: Sequence[Slot],
    windows: Windows,
    rows: Callable[[Tensor], Tensor],
    check: Callable[[], None],
) -> None:
    """Write the first block's input, durably: the same for all streams.

    ``rows`` gives rows of the embedding by their numbers, which ascend.
    """
    for slot in slots:
        slot.renew()
    shape = slots[0].shape
    for unit in range(shape.units):
        check()
        token_BT = windows.tokens(unit * shape.unit_sequences, shape.unit_sequences)
        token_N, place_BT = token_BT.unique(return_inverse=True)
        x_BTD = rows(token_N)[place_BT].to(shape.dtype)
        for slot in slots:
            slot.write(unit, x_BTD, durable=True)
    for slot in slots:
        slot.flush(durable=True)
