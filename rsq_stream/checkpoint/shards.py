"""Read a checkpoint's safetensors shards: by header, one tensor at a time.

Every number from disk is bounded before it sizes anything. Nothing is mapped
into memory, so the page cache never counts as ours.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsq_stream.checkpoint.files import Files, read_header
from rsq_stream.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LARGEST_JSON_BYTES = 500_000_000
_READ_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies: shard, type, shape, and bytes from the data's start."""

    name: str
    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class Checkpoint:
    """A folder or hub repository of safetensors shards, known by its headers."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.config: dict[str, Any] = self.read_json("config.json")
        self.shards = self._shard_names()
        self.tensors: dict[str, TensorEntry] = {}
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            for entry in self._entries(shard, *files.header(shard)):
                if entry.name in self.tensors:
                    raise CheckpointError(
                        f"{files.where}/{shard}: {entry.name} is in another shard too"
                    )
                self.tensors[entry.name] = entry
                digest.update(repr(entry).encode())
        self.headers_sha256 = digest.hexdigest()
        if self.config.get("tie_word_embeddings") and _HEAD in self.tensors:
            # Of two tied tensors, some writers keep only the one called the head.
            self.tensors.setdefault(_EMBEDDING, self.tensors[_HEAD])
        self._data_start: dict[str, int] = {}

    def _entries(self, shard: str, header: bytes, data_bytes: int) -> list[TensorEntry]:
        return parse_header(header, shard, data_bytes, f"{self.files.where}/{shard}")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one of the checkpoint's JSON files.

        Raises
        ------
        CheckpointError
            The file is missing, too large, or not a JSON object.
        """
        path = self.files.path(name)
        where = f"{self.files.where}/{name}"
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise CheckpointError(f"{where}: larger than any file of its kind")
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{where}: a JSON object was expected")
        return content

    def _shard_names(self) -> list[str]:
        if not self.files.exists(INDEX):
            if not self.files.exists(SINGLE):
                raise CheckpointError(
                    f"{self.files.where}: neither {SINGLE} nor {INDEX} is there;"
                    " only safetensors checkpoints are read"
                )
            return [SINGLE]
        where = f"{self.files.where}/{INDEX}"
        weight_map = self.read_json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{where}: no weight_map")
        names = sorted({str(shard) for shard in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{where}: {name!r} is not a plain .safetensors file name"
                )
            if not self.files.exists(name):
                raise CheckpointError(
                    f"{where}: names {name}, which is missing; fetch it again"
                )
        return names

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> TensorEntry:
        """Return a tensor's entry; with ``shape``, check it.

        Raises
        ------
        CheckpointError
            There is no such tensor, or its shape is another.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.files.where}: no tensor named {name}")
        if shape is not None and entry.shape != shape:
            raise CheckpointError(
                f"{self.files.where}/{entry.shard}: {name} has shape"
                f" {list(entry.shape)}, but config.json makes it {list(shape)}"
            )
        return entry

    def read(self, name: str) -> Tensor:
        """Read one tensor from its shard."""
        entry = self.entry(name)
        raw = torch.empty(entry.size_bytes, dtype=torch.uint8)
        with self._opened(entry) as (file, start):
            self._fill(raw, file, start, entry)
        return raw.view(entry.dtype).view(entry.shape)

    def read_chunks(self, name: str, rows: int) -> Iterator[Tensor]:
        """Read a tensor so many rows at a time; the last chunk may have fewer."""
        entry = self.entry(name)
        row_bytes = entry.size_bytes // max(1, entry.shape[0])
        for first in range(0, entry.shape[0], rows):
            count = min(rows, entry.shape[0] - first)
            raw = torch.empty(count * row_bytes, dtype=torch.uint8)
            with self._opened(entry) as (file, start):
                self._fill(raw, file, start + first * row_bytes, entry)
            yield raw.view(entry.dtype).view(count, *entry.shape[1:])

    def read_rows(self, name: str, index_N: Tensor) -> Tensor:
        """Read some rows of a tensor, by their numbers."""
        entry = self.entry(name)
        row_bytes = entry.size_bytes // max(1, entry.shape[0])
        raw_NR = torch.empty(len(index_N), row_bytes, dtype=torch.uint8)
        with self._opened(entry) as (file, start):
            for raw_R, row in zip(raw_NR, index_N.tolist(), strict=True):
                self._fill(raw_R, file, start + row * row_bytes, entry)
        return raw_NR.view(-1).view(entry.dtype).view(-1, *entry.shape[1:])

    @contextmanager
    def _opened(self, entry: TensorEntry) -> Iterator[tuple[int, int]]:
        """Open a tensor's shard; gives the file, and where in it the tensor begins."""
        path = self.files.path(entry.shard)
        start = self._start_of_data(entry.shard, path) + entry.offset
        with path.open("rb", buffering=0) as file:
            yield file.fileno(), start

    def _fill(self, raw: Tensor, file: int, start: int, entry: TensorEntry) -> None:
        view, done = raw.numpy().data, 0
        while done < len(view):
            part = view[done : done + _READ_BYTES]
            count = os.preadv(file, [part], start + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.files.where}/{entry.shard}: ends inside {entry.name};"
                    " the file was cut short since the run began"
                )
            done += count

    def _start_of_data(self, shard: str, path: Path) -> int:
        """Check once that a shard still has the header that the plan saw."""
        if shard not in self._data_start:
            header, start, file_bytes = read_header(path, self.files.where)
            entries = self._entries(shard, header, file_bytes - start)
            if any(self.tensors.get(entry.name) != entry for entry in entries):
                raise CheckpointError(
                    f"{self.files.where}/{shard}: changed since the run began"
                )
            self._data_start[shard] = start
        return self._data_start[shard]

    def read_many(self, prefix: str, names: list[str]) -> dict[str, Tensor]:
        """Read several tensors under a prefix, in the order they lie on disk."""
        entries = [self.entry(prefix + name) for name in names]
        entries.sort(key=lambda entry: (entry.shard, entry.offset))
        return {
            entry.name.removeprefix(prefix): self.read(entry.name) for entry in entries
        }


def parse_header(
    header: bytes, shard: str, data_bytes: int, where: str
) -> list[TensorEntry]:
    """Check a shard's header against the file and give its tensors.

    Raises
    ------
    CheckpointError
        Not JSON, an unknown type, a shape that does not fit its bytes, bytes
        outside the file, overlapping tensors or bytes that no tensor owns.
    """
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: header is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: header is not a JSON object")
    entries = [
        _parse_entry(name, value, shard, where)
        for name, value in content.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.offset, entry.size_bytes))
    expected = 0
    for entry in entries:
        if entry.offset != expected:
            raise CheckpointError(f"{where}: {entry.name} overlaps or leaves a gap")
        expected += entry.size_bytes
    if expected != data_bytes:
        raise CheckpointError(
            f"{where}: its tensors need {expected} bytes, the file holds"
            f" {data_bytes}; it was cut short or is damaged, fetch it again"
        )
    return entries


def _parse_entry(name: str, value: Any, shard: str, where: str) -> TensorEntry:
    try:
        dtype = TYPES[value["dtype"]]
        shape = tuple(value["shape"])
        begin, end = value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: bad header entry for {name}") from error
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise CheckpointError(f"{where}: {name} has sizes out of bounds")
    size_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != size_bytes:
        raise CheckpointError(
            f"{where}: {name} of shape {list(shape)} needs {size_bytes} bytes,"
            f" its offsets give {end - begin}"
        )
    return TensorEntry(
        name=name,
        shard=shard,
        dtype=dtype,
        shape=shape,
        offset=begin,
        size_bytes=size_bytes,
    )
