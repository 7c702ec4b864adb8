"""Activations between stages: in memory up to a budget, in Zarr on disk beyond it.

A slot is an array [sequences, tokens, width] of the cache type, one Zarr chunk a
unit of computation. Zarr has no bfloat16, so 16-bit types are stored as uint16
and fp32 as uint32. Reads run ahead of the compute and writes behind it, both
bounded, so host memory does not grow with the calibration set.

A missing chunk reads as zeros in Zarr: presence proves nothing. So each chunk's
checksum is kept, and checked when the chunk is read.
"""

import os
import re
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from rsq_stream.errors import DamagedError, RsqError
from rsq_stream.storage import atomic
from rsq_stream.storage.steps import step

_STORED_AS = {
    torch.float32: (np.uint32, torch.uint32),
    torch.bfloat16: (np.uint16, torch.uint16),
    torch.float16: (np.uint16, torch.uint16),
}


@dataclass(frozen=True)
class SlotShape:
    """The shape of every slot of a run, and how it is cut into units."""

    sequences: int
    tokens: int
    width: int
    unit_sequences: int
    dtype: torch.dtype

    @property
    def units(self) -> int:
        """Chunks of a slot; the last one may hold fewer sequences."""
        return -(-self.sequences // self.unit_sequences)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a full chunk."""
        return self.unit_sequences * self.tokens * self.width * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of a whole slot."""
        return self.sequences * self.tokens * self.width * self.dtype.itemsize

    def unit_shape(self, unit: int) -> tuple[int, int, int]:
        """Give the shape of one unit's activations."""
        first = unit * self.unit_sequences
        count = min(self.unit_sequences, self.sequences - first)
        return count, self.tokens, self.width


def has_direct_io(folder: Path) -> bool:
    """Whether the file system takes O_DIRECT; without it writes are buffered."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    probe = folder / ".direct-io-probe"
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY | flag, 0o600)
    except OSError:
        return False
    else:
        os.close(descriptor)
        return True
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what Zarr and zarrs raise into one line; zarrs hides the system's error."""
    try:
        with atomic.explained(path):
            yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, RsqError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        code = re.search(r"\(os error (\d+)\)", reason)
        if code:
            system = OSError(int(code[1]), os.strerror(int(code[1])))
            raise atomic.explanation(path, system) from error
        raise damaged(path) from error


def damaged(path: Path) -> DamagedError:
    """Give the error that names a chunk, or a slot, that is not what was written."""
    slot = path.parent if path.name.startswith("c.") else path
    return DamagedError(
        f"{path}: the stored activations are damaged or missing", slot.name
    )


class Slot:
    """One array of activations; units below ``resident`` stay in memory."""

    def __init__(
        self, folder: Path, shape: SlotShape, resident: int, depth: int, *, direct: bool
    ) -> None:
        self.shape = shape
        self.folder = folder
        self.checksums: dict[int, int] = {}
        self._resident = resident
        self._depth = depth
        self._direct = direct
        self._memory: dict[int, Tensor] = {}
        self._array: zarr.Array[Any] | None = None
        self._writes: deque[Future[None]] = deque()
        self._writing = threading.Lock()
        self._reader = ThreadPoolExecutor(1, "rsq-read")
        self._writer = ThreadPoolExecutor(1, "rsq-write")

    def write(self, unit: int, x_BTD: Tensor, *, durable: bool) -> None:
        """Keep a unit's activations; they are on disk after the next ``flush``.

        A unit that stays in memory goes to disk only if it must be ``durable``.
        """
        if (
            x_BTD.shape != self.shape.unit_shape(unit)
            or x_BTD.dtype != self.shape.dtype
        ):
            raise ValueError(f"unit {unit}: {x_BTD.dtype} {tuple(x_BTD.shape)}")
        x_BTD = x_BTD.to("cpu").contiguous()
        if unit < self._resident:
            self._memory[unit] = x_BTD
        if durable or unit >= self._resident:
            with self._writing:
                while len(self._writes) >= self._depth:
                    self._writes.popleft().result()
                self._writes.append(self._writer.submit(self._store, unit, x_BTD))

    def read(self, units: Iterable[int]) -> Iterator[Tensor]:
        """Give units in order, reading ahead of whoever takes them."""
        ahead: deque[Future[Tensor] | int] = deque()
        for unit in units:
            here = unit in self._memory
            ahead.append(unit if here else self._reader.submit(self._load, unit))
            if len(ahead) > self._depth:
                yield self._taken(ahead.popleft())
        while ahead:
            yield self._taken(ahead.popleft())

    def _taken(self, item: "Future[Tensor] | int") -> Tensor:
        return self._memory[item] if isinstance(item, int) else item.result()

    def flush(self, *, durable: bool) -> None:
        """Wait for the writes; with ``durable`` a power cut cannot undo them."""
        while self._writes:
            self._writes.popleft().result()
        if durable:
            with atomic.explained(self.folder):
                for unit in self.checksums:
                    atomic.sync_file(self._chunk_path(unit))
                atomic.sync_file(self.folder / "zarr.json")
                atomic.sync_folder(self.folder)
                atomic.sync_folder(self.folder.parent)

    def clear(self) -> None:
        """Forget what the slot holds: nobody needs it any more."""
        self._memory.clear()
        self.checksums.clear()

    def renew(self) -> None:
        """Make ready for other contents; what a dead process left here is removed."""
        wait(self._writes)  # whatever became of them
        self._writes.clear()
        self.clear()
        if self._array is None:
            atomic.remove_tree(self.folder)

    def close(self) -> None:
        """Stop reading and writing."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)

    def _chunk_path(self, unit: int) -> Path:
        return self.folder / f"c.{unit}.0.0"

    def _open(self) -> "zarr.Array[Any]":
        """Open the array, or make it; the chunk layout is fixed by the shape."""
        if self._array is None:
            shape, stored = self.shape, _STORED_AS[self.shape.dtype][0]
            settings = {
                "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
                "codec_pipeline.direct_io": self._direct,
                "threading.max_workers": 1,
            }
            with zarr.config.set(settings), _explained(self.folder):
                if (self.folder / "zarr.json").exists():
                    self._array = zarr.open_array(self.folder, mode="r+")
                else:
                    self._array = zarr.create_array(
                        self.folder,
                        # Whole chunks: a part of one would be read to be written.
                        shape=(
                            shape.units * shape.unit_sequences,
                            shape.tokens,
                            shape.width,
                        ),
                        chunks=(shape.unit_sequences, shape.tokens, shape.width),
                        dtype=stored,
                        compressors=None,
                        fill_value=0,
                        chunk_key_encoding={"name": "default", "separator": "."},
                    )
        return self._array

    def _store(self, unit: int, x_BTD: Tensor) -> None:
        raw = x_BTD.view(_STORED_AS[x_BTD.dtype][1]).numpy()
        crc, path = zlib.crc32(raw.data), self._chunk_path(unit)
        first, whole = unit * self.shape.unit_sequences, self.shape.unit_sequences
        if len(raw) < whole:
            raw = np.pad(raw, ((0, whole - len(raw)), (0, 0), (0, 0)))
        with _explained(path), step("write", path):
            self._open()[first : first + whole] = raw
        self.checksums[unit] = crc

    def _load(self, unit: int) -> Tensor:
        with _explained(self._chunk_path(unit)):
            first = unit * self.shape.unit_sequences
            rows = slice(first, first + self.shape.unit_shape(unit)[0])
            raw = np.ascontiguousarray(self._open()[rows])
        if self.checksums.get(unit) != zlib.crc32(raw.data):
            self._array = None  # its metadata may be what is wrong: made anew
            raise damaged(self._chunk_path(unit))
        return torch.from_numpy(raw).view(self.shape.dtype)
