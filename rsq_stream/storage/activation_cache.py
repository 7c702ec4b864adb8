"""Activations between stages: in memory up to a budget, in Zarr on disk beyond it.

A slot is an array [sequences, tokens, width] of the cache type, one Zarr chunk a
unit of computation. Zarr has no bfloat16, so 16-bit types are stored as uint16
and fp32 as uint32. Zarr makes the array and its metadata; the chunks, which are bare
bytes, are written and read here, at the speed of the disk. Reads run ahead of the
compute and writes behind it, both bounded, so host memory does not grow with the
calibration set.

A missing chunk reads as zeros in Zarr: presence proves nothing. So each chunk's
checksum is kept, and checked when the chunk is read.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from rsq_stream.errors import DamagedError
from rsq_stream.runtime.tensor_arena import TensorArena
from rsq_stream.runtime.transfers import PendingCopy, Transfers
from rsq_stream.storage import atomic
from rsq_stream.storage.activation_shape import SlotShape
from rsq_stream.storage.checksum import checksum
from rsq_stream.storage.crash_points import crash_point
from rsq_stream.storage.direct_io import aligned_empty, read_chunk, write_chunk

_STORED_AS = {
    torch.float32: np.uint32,
    torch.bfloat16: np.uint16,
    torch.float16: np.uint16,
}


def damaged(path: Path) -> DamagedError:
    """Return the error that names a chunk, or a slot, that is not what was written."""
    slot = path.parent if path.name.startswith("c.") else path
    return DamagedError(
        f"{path}: the stored activations are damaged or missing", slot.name
    )


class Slot:
    """One array of activations; units below ``resident`` stay in memory."""

    def __init__(
        self,
        folder: Path,
        shape: SlotShape,
        resident: int,
        depth: int,
        *,
        direct: bool,
        transit: Transfers | None = None,
    ) -> None:
        """Take an empty slot, or one whose checksums will be known.

        With ``transit``, units come from a GPU and go there beside its compute.
        """
        self.shape = shape
        self.folder = folder
        self.checksums: dict[int, int] = {}
        self._resident = resident
        self._depth = depth
        self._direct = direct
        self._transit = transit
        self._memory = TensorArena(resident, shape.unit_bytes)
        self._made = False
        self._writes: deque[Future[None]] = deque()
        self._buffers: list[NDArray[np.uint8]] = []
        """Written out and free again: fresh memory would cost more than the copy."""
        self._writing = threading.Lock()
        self._reader = ThreadPoolExecutor(1, "rsq-read")
        # What a GPU gives is waited for, copied, summed and written by the unit: one
        # thread does less than a gigabyte a second of that.
        writers = 1 if transit is None else depth + 1
        self._writer = ThreadPoolExecutor(writers, "rsq-write")
        self._opening = threading.Lock()

    def write(self, unit: int, x_BTD: Tensor, *, durable: bool) -> None:
        """Keep a unit's activations; they are on disk after the next ``flush``.

        A unit that stays in memory goes to disk only if it must be ``durable``.
        """
        if (
            x_BTD.shape != self.shape.unit_shape(unit)
            or x_BTD.dtype != self.shape.dtype
        ):
            raise ValueError(f"unit {unit}: {x_BTD.dtype} {tuple(x_BTD.shape)}")
        to_disk = durable or unit >= self._resident
        if self._transit is not None and self._transit.outbound.carries(x_BTD):
            leaving = self._transit.outbound.take(x_BTD)
            self._behind(self._land, unit, leaving, to_disk)
            return
        if unit < self._resident:
            self._memory.put(unit, x_BTD)
        if to_disk:
            content = self._staged(x_BTD)
            self.checksums[unit] = checksum(content.data)
            self._behind(self._store_staged, unit, content)

    def _behind(self, work: Callable[..., None], *given: object) -> None:
        """Have a writer's thread do it; as many as the depth wait for their turn."""
        with self._writing:
            # Handed over before an earlier one's error: what it holds is given back.
            self._writes.append(self._writer.submit(work, *given))
            while len(self._writes) > self._depth:
                self._writes.popleft().result()

    def _land(self, unit: int, leaving: PendingCopy, to_disk: bool) -> None:
        """Keep what comes from the device: in memory, on disk, or both."""
        count = prod(self.shape.unit_shape(unit)) * self.shape.dtype.itemsize
        with leaving.landed() as buffer:
            if unit < self._resident:
                dense = buffer[:count].view(self.shape.dtype)
                self._memory.put(unit, dense.view(self.shape.unit_shape(unit)))
            if to_disk:
                buffer[count:].zero_()
                content = buffer.numpy()
                self.checksums[unit] = checksum(content.data)
                self._store(unit, content)

    def arriving(self, units: Iterable[int], in_flight: int) -> Iterator[Tensor]:
        """Return units in order: on the GPU, where they go there beside its compute.

        What is given holds for a run of ``in_flight`` (``runtime/transfers.py``).
        """
        if self._transit is None:
            return self.read(units)
        return self._transit.inbound.arriving(units, self._fill, in_flight)

    def _fill(self, unit: int, buffer: Tensor) -> Tensor:
        """Bring a unit into a buffer."""
        if unit not in self._memory:
            return self._load(unit, buffer.numpy())
        x_BTD = self._memory.get(unit)
        dense = buffer[: x_BTD.nbytes].view(x_BTD.dtype).view(x_BTD.shape)
        return dense.copy_(x_BTD)

    def read(self, units: Iterable[int]) -> Iterator[Tensor]:
        """Return units in order, reading ahead of whoever takes them."""
        ahead: deque[Future[Tensor] | int] = deque()
        for unit in units:
            here = unit in self._memory
            ahead.append(unit if here else self._reader.submit(self._load, unit))
            if len(ahead) > self._depth:
                yield self._taken(ahead.popleft())
        while ahead:
            yield self._taken(ahead.popleft())

    def _taken(self, item: "Future[Tensor] | int") -> Tensor:
        return self._memory.get(item) if isinstance(item, int) else item.result()

    def flush(self, *, durable: bool) -> None:
        """Wait for the writes; with ``durable`` a power cut cannot undo them."""
        while self._writes:
            self._writes.popleft().result()
        self._buffers.clear()
        if durable:
            with atomic.error_context(self.folder):
                for unit in self.checksums:
                    atomic.sync_file(self._chunk_path(unit))
                atomic.sync_file(self.folder / "zarr.json")
                atomic.sync_folder(self.folder)
                atomic.sync_folder(self.folder.parent)

    def release(self) -> None:
        """Let go of memory: what is read again comes from disk, if it was durable."""
        self._memory.clear()

    def clear(self) -> None:
        """Forget what the slot holds: nobody needs it any more."""
        self._memory.clear()
        self.checksums.clear()

    def renew(self) -> None:
        """Make ready for other contents; what a dead process left here is removed."""
        # Whatever became of writes, and of reads ahead that nobody took.
        wait([*self._writes, self._reader.submit(lambda: None)])
        self._writes.clear()
        self._buffers.clear()
        self.clear()
        if not self._made:
            atomic.remove_tree(self.folder)

    def close(self) -> None:
        """Stop reading and writing."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)

    def _chunk_path(self, unit: int) -> Path:
        return self.folder / f"c.{unit}.0.0"

    def _staged(self, x_BTD: Tensor) -> NDArray[np.uint8]:
        """Copy a unit's bytes to where the disk takes them; zeros fill the last."""
        try:
            content = self._buffers.pop()
        except IndexError:
            content = aligned_empty(self.shape.unit_bytes)
        dense = torch.from_numpy(content).view(x_BTD.dtype)
        dense[: x_BTD.numel()].view_as(x_BTD).copy_(x_BTD)
        dense[x_BTD.numel() :].zero_()
        return content

    def _require_array(self) -> None:
        """Make the array if there is none, else see that it is the one of this shape.

        Raises
        ------
        DamagedError
            Its metadata is not what was written.
        """
        with self._opening:
            if not self._made:
                self._open_array()
                self._made = True

    def _open_array(self) -> None:
        shape = self.shape
        # Whole chunks: the last one is as long as the others.
        whole = shape.units * shape.unit_sequences, shape.tokens, shape.width
        layout: dict[str, Any] = {
            "shape": whole,
            "chunks": (shape.unit_sequences, *whole[1:]),
            "dtype": np.dtype(_STORED_AS[shape.dtype]),
        }
        if not (self.folder / "zarr.json").exists():
            zarr.create_array(
                self.folder,
                **layout,
                compressors=None,
                fill_value=0,
                chunk_key_encoding={"name": "default", "separator": "."},
            )
        else:
            try:
                array = zarr.open_array(self.folder, mode="r")
                found = {key: getattr(array, key) for key in layout}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise damaged(self.folder) from error
            if found != layout:
                raise damaged(self.folder)

    def _store_staged(self, unit: int, content: NDArray[np.uint8]) -> None:
        self._store(unit, content)
        self._buffers.append(content)

    def _store(self, unit: int, content: NDArray[np.uint8]) -> None:
        path = self._chunk_path(unit)
        with atomic.error_context(path), crash_point("write", path):
            self._require_array()
            write_chunk(path, content, direct=self._direct)

    def _load(self, unit: int, into: NDArray[np.uint8] | None = None) -> Tensor:
        path, shape = self._chunk_path(unit), self.shape
        with atomic.error_context(path):
            self._require_array()
            try:
                content = read_chunk(
                    path, shape.unit_bytes, direct=self._direct, into=into
                )
            except FileNotFoundError as error:
                raise damaged(path) from error
        if len(content) != shape.unit_bytes or checksum(
            content.data
        ) != self.checksums.get(unit):
            self._made = False  # its metadata may be what is wrong: made anew
            raise damaged(path)
        count, *rest = shape.unit_shape(unit)
        dense = torch.from_numpy(content).view(shape.dtype)
        return dense.view(-1, *rest)[:count]
