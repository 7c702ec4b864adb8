"""The quantized shards: final names and sizes from the first write on.

All shapes are known before the run, so every shard's header and the place of
every tensor are too. Tensors are written where they belong, once; a shard gets
its name when it is full, read back and checked.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rsq_stream.checkpoint.formats.base import OutputTensor, ShardLayout
from rsq_stream.errors import DamagedError, OutputError
from rsq_stream.storage import atomic
from rsq_stream.storage.atomic import PartialFile
from rsq_stream.storage.checksum import Checksum

_READ_BYTES = 1 << 22


class ShardWriter:
    """Writes tensors to their shards; a shard is renamed when it is whole."""

    def __init__(
        self, folder: Path, layouts: list[ShardLayout], checksums: Mapping[str, int]
    ) -> None:
        """Go on in ``folder`` where ``checksums`` says which tensors are there."""
        self._folder = folder
        self._layouts = {layout.name: layout for layout in layouts}
        self._shard_of = {name: layout for layout in layouts for name in layout.places}
        self._files: dict[str, PartialFile] = {}
        self.checksums = dict(checksums)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor where it belongs; type and shape must be as announced."""
        announced = self._shard_of[name].places[name][1]
        if tuple(tensor.shape) != announced.shape:
            raise _misfit(tensor, announced)
        self.write_chunks([{name: tensor}])

    def write_chunks(self, chunks: Iterable[Mapping[str, Tensor]]) -> None:
        """Write tensors that come some rows at a time, each from its first row on.

        A tensor counts as written when all its rows are.
        """
        sums: dict[str, Checksum] = {}
        done: dict[str, int] = {}
        for chunk in chunks:
            for name, tensor in chunk.items():
                layout = self._shard_of[name]
                offset, announced = layout.places[name]
                written = done.get(name, 0)
                fits = written + tensor.nbytes <= announced.size_bytes
                same = tuple(tensor.shape[1:]) == announced.shape[1:]
                if not fits or not same or tensor.dtype != announced.dtype:
                    raise _misfit(tensor, announced)
                dense = tensor.detach().to("cpu").contiguous()
                raw = dense.view(-1).view(torch.uint8).numpy().data
                self._open(layout).write(offset + written, raw)
                sums.setdefault(name, Checksum()).update(raw)
                done[name] = written + tensor.nbytes
        for name, written in done.items():
            announced = self._shard_of[name].places[name][1]
            if written != announced.size_bytes:
                raise OutputError(
                    f"{name}: {written} bytes came, {announced.size_bytes} belong there"
                )
            self.checksums[name] = sums[name].value

    def read(self, name: str) -> Tensor:
        """Read back a tensor that was written, by an earlier process too.

        Raises
        ------
        DamagedError
            What is on disk is not what was written.
        """
        announced = self._shard_of[name].places[name][1]
        raw = bytearray()
        for piece in self._intact(name):
            raw += piece
        tensor = torch.frombuffer(raw, dtype=announced.dtype)
        return tensor.view(announced.shape)

    def read_rows(self, name: str, index_N: Tensor) -> Tensor:
        """Read some rows of a tensor that was written, as they are on disk."""
        layout = self._shard_of[name]
        offset, announced = layout.places[name]
        row_bytes = announced.size_bytes // announced.shape[0]
        raw = bytearray()
        with self._reading(layout) as read:
            for row in index_N.tolist():
                raw += read(offset + row * row_bytes, row_bytes)
        if len(raw) != len(index_N) * row_bytes:
            raise self._damaged(layout, name)
        tensor = torch.frombuffer(raw, dtype=announced.dtype)
        return tensor.view(-1, *announced.shape[1:])

    def require_tensor(self, name: str) -> None:
        """Read a tensor back, a piece at a time, before anything builds on it.

        Raises
        ------
        DamagedError
            What is on disk is not what was written.
        """
        for _ in self._intact(name):
            pass

    def _intact(self, name: str) -> Iterator[bytes]:
        """Return a tensor's bytes in pieces; refuse others than were written."""
        layout = self._shard_of[name]
        offset, announced = layout.places[name]
        found, done = Checksum(), 0
        with self._reading(layout) as read:
            while done < announced.size_bytes:
                want = min(_READ_BYTES, announced.size_bytes - done)
                piece = read(offset + done, want)
                if not piece:
                    break
                found.update(piece)
                done += len(piece)
                yield piece
        if found.value != self.checksums.get(name):
            raise self._damaged(layout, name)

    @contextmanager
    def _reading(self, layout: ShardLayout) -> Iterator[Callable[[int, int], bytes]]:
        """Return what reads so many bytes at an offset of a shard, named or not."""
        path = self._folder / layout.name
        if layout.name in self._files or not path.is_file():
            yield self._open(layout).read
            return
        with atomic.error_context(path), path.open("rb") as named:
            yield lambda offset, size: os.pread(named.fileno(), size, offset)

    def sync(self) -> None:
        """Make all tensors written so far durable."""
        for file in self._files.values():
            file.sync()

    def full_shards(self) -> list[ShardLayout]:
        """Return open shards that hold all their tensors, in order."""
        return [
            layout
            for layout in self._layouts.values()
            if layout.name in self._files
            and layout.places.keys() <= self.checksums.keys()
        ]

    def reopen(self, finished: set[str]) -> None:
        """After a resume: open the shards that were begun and have no name yet."""
        for layout in self._layouts.values():
            begun = not self.checksums.keys().isdisjoint(layout.places)
            if begun and layout.name not in finished:
                self._open(layout)

    def forget(self, names: Iterable[str]) -> None:
        """Take back that tensors were written: they will be written again."""
        for name in names:
            self.checksums.pop(name, None)

    def require_intact(self) -> None:
        """Read the tensors of all open shards back, before anything builds on them.

        Raises
        ------
        DamagedError
            One of them is not what was written.
        """
        for name, layout in self._shard_of.items():
            if layout.name in self._files and name in self.checksums:
                self.require_tensor(name)

    def finish(self, layout: ShardLayout) -> str:
        """Check a full shard against its checksums, name it; gives its sha256.

        Raises
        ------
        DamagedError
            What is on disk is not what was written.
        """
        file = self._files[layout.name]
        digest = hashlib.sha256(layout.header)
        if file.read(0, len(layout.header)) != layout.header:
            file.write(0, memoryview(layout.header))
        for name in layout.places:
            for piece in self._intact(name):
                digest.update(piece)
        del self._files[layout.name]
        file.commit()
        return digest.hexdigest()

    def _damaged(self, layout: ShardLayout, name: str) -> DamagedError:
        ending = atomic.PARTIAL if layout.name in self._files else ""
        return DamagedError(
            f"{self._folder / layout.name}{ending}: {name} is not what was written; the"
            " disk or somebody changed it",
            name,
        )

    def _open(self, layout: ShardLayout) -> PartialFile:
        if layout.name not in self._files:
            file = PartialFile(self._folder / layout.name, layout.size_bytes)
            file.write(0, memoryview(layout.header))
            self._files[layout.name] = file
        return self._files[layout.name]

    def close(self) -> None:
        """Close the shards that are not full yet; they stay partial."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _misfit(tensor: Tensor, announced: OutputTensor) -> OutputError:
    return OutputError(
        f"{announced.name}: {tensor.dtype} {list(tensor.shape)} was to be written where"
        f" {announced.dtype} {list(announced.shape)} belongs"
    )
