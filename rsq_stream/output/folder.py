"""The output: a Hugging Face folder that opens without this tool.

Shards come first, each under its name once it is whole; the small files follow
when all shards are there, ``rsq_stream.sha256`` last: a folder that has it is
complete.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from rsq_stream.checkpoint.files import SIDE_FILES
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.formats.base import json_bytes
from rsq_stream.checkpoint.manifest import SEAL, write_manifest
from rsq_stream.checkpoint.output_tensors import output_is_tied
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import OutputError
from rsq_stream.events import LinearRecord
from rsq_stream.model.architecture import Architecture
from rsq_stream.output.folder_checks import CARD, small_files
from rsq_stream.output.layout import bits_per_weight, plan_layouts
from rsq_stream.output.model_card import model_card
from rsq_stream.output.shard_writer import ShardWriter
from rsq_stream.storage import atomic
from rsq_stream.storage.journal import Journal


class OutputFolder:
    """The output folder of one run."""

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        *,
        architecture: Architecture,
        plan: QuantizationPlan,
        journal: Journal,
    ) -> None:
        self.path = path
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._plan = plan
        self._journal = journal
        self._layouts = plan_layouts(checkpoint, architecture, plan)
        atomic.make_folder(path)
        done = journal.tensors()
        self._journalled = set(done)
        self._require_parts()
        self._writer = ShardWriter(path, self._layouts, done)
        self._adopt_named_shards()
        self._remove_leftovers()

    def _require_parts(self) -> None:
        """Notice before the next block if a shard that was begun is gone."""
        for layout in self._layouts:
            if self._journalled.isdisjoint(layout.places):
                continue
            path = self.path / layout.name
            parts = (path, path.with_name(path.name + atomic.PARTIAL))
            if not any(
                part.is_file() and part.stat().st_size == layout.size_bytes
                for part in parts
            ):
                raise OutputError(
                    f"{path}: the run in the work folder began this shard, and it is"
                    " gone or cut short; give the --output it had, or --restart"
                )

    def _adopt_named_shards(self) -> None:
        """After a kill between a shard's rename and its journal row: add the row."""
        named = self._journal.shards()
        for layout in self._layouts:
            path = self.path / layout.name
            full = layout.places.keys() <= self._journalled
            if layout.name in named or not full or not path.is_file():
                continue
            sha256 = atomic.sha256_of(path)
            self._journal.finish_shard(layout.name, layout.size_bytes, sha256)
        self._writer.reopen(set(self._journal.shards()))

    def _remove_leftovers(self) -> None:
        """Remove small files that a dead run had not finished."""
        for name in sorted(small_files()):
            atomic.remove_file(self.path / (name + atomic.PARTIAL))

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors where they belong in the shards."""
        for name, tensor in tensors.items():
            self._writer.write(name, tensor)

    def write_chunks(self, chunks: Iterable[Mapping[str, Tensor]]) -> None:
        """Write tensors that come some rows at a time, each from its first row on."""
        self._writer.write_chunks(chunks)

    def read(self, name: str) -> Tensor:
        """Read back a tensor of a shard that is not whole yet."""
        return self._writer.read(name)

    def read_rows(self, name: str, index_N: Tensor) -> Tensor:
        """Read some rows of a tensor that was written, as they are on disk."""
        return self._writer.read_rows(name, index_N)

    def require_tensor(self, name: str) -> None:
        """Check a tensor before anything builds on single rows of it.

        Raises
        ------
        DamagedError
            What is on disk is not what was written.
        """
        self._writer.require_tensor(name)

    def checksum(self, name: str) -> int | None:
        """Return the checksum of a tensor that was written."""
        return self._writer.checksums.get(name)

    def forget(self, names: Collection[str]) -> None:
        """Take tensors back that will be written again."""
        self._writer.forget(names)
        self._journalled -= set(names)

    def require_intact(self) -> None:
        """Check what an earlier part of the run left in shards without a name.

        Raises
        ------
        DamagedError
            A tensor is not what was written.
        """
        self._writer.require_intact()

    def sync(self) -> None:
        """Make all tensors written so far durable."""
        self._writer.sync()

    def new_checksums(self) -> dict[str, int]:
        """Return the checksums of tensors written since the last call."""
        fresh = {
            name: written
            for name, written in self._writer.checksums.items()
            if name not in self._journalled
        }
        self._journalled |= fresh.keys()
        return fresh

    @property
    def has_full_shards(self) -> bool:
        """Whether some shard is whole and has no name yet."""
        return bool(self._writer.full_shards())

    def name_full_shards(self) -> list[tuple[str, int]]:
        """Check and rename the shards that are whole; gives their names and sizes."""
        named = []
        for layout in self._writer.full_shards():
            sha256 = self._writer.finish(layout)
            self._journal.finish_shard(layout.name, layout.size_bytes, sha256)
            named.append((layout.name, layout.size_bytes))
        return named

    def require_whole(self) -> None:
        """Read every shard once more: the seal answers for what is on disk.

        Raises
        ------
        OutputError
            A shard is gone or is not what was written.
        """
        for name, (size, sha256) in self._journal.shards().items():
            path = self.path / name
            sound = path.is_file() and path.stat().st_size == size
            if not sound or atomic.sha256_of(path) != sha256:
                # No finished output any more: so --restart may remove it.
                atomic.remove_file(self.path / SEAL)
                raise OutputError(
                    f"{path}: is gone or not what was written; the disk or somebody"
                    " changed it, --restart starts over"
                )

    def write_small_files(
        self, records: list[LinearRecord], source: Mapping[str, str]
    ) -> int:
        """Write everything that is no shard, the seal last; gives all bytes.

        ``source`` has the sha256 of each source shard.
        """
        stored = FORMATS[self._plan.output_format]
        contents = stored.small_files(
            self._config(), self._plan, self._architecture, self._layouts
        )
        contents[CARD] = model_card(
            self._plan, self._architecture, records, self._bits_per_weight()
        ).encode()
        for name in SIDE_FILES:
            if self._checkpoint.files.exists(name):
                contents[name] = self._checkpoint.files.path(name).read_bytes()
        for name, content in contents.items():
            atomic.write_file(self.path / name, content)
        files: dict[str, dict[str, Any]] = {
            name: {"bytes": size, "sha256": sha256}
            for name, (size, sha256) in self._journal.shards().items()
        }
        for name, content in contents.items():
            sha256 = hashlib.sha256(content).hexdigest()
            files[name] = {"bytes": len(content), "sha256": sha256}
        manifest = json_bytes(
            {
                "plan": dataclasses.asdict(self._plan),
                "plan_sha256": self._plan.sha256,
                "versions": _versions(),
                "source": source,
                "device_changes": json.loads(
                    self._journal.get("device_changes") or "[]"
                ),
                "bits_per_weight": self._bits_per_weight(),
                "linears": [dataclasses.asdict(made) for made in records],
                "files": dict(sorted(files.items())),
            }
        )
        write_manifest(self.path, manifest)
        return sum(int(entry["bytes"]) for entry in files.values()) + len(manifest)

    def _config(self) -> dict[str, Any]:
        config = dict(self._checkpoint.config)
        config["tie_word_embeddings"] = output_is_tied(self._architecture, self._plan)
        return config

    def _bits_per_weight(self) -> float:
        return bits_per_weight(self._architecture, self._layouts)

    def close(self) -> None:
        """Close shards that are not whole yet; they stay partial."""
        self._writer.close()


def _versions() -> dict[str, str]:
    return {
        name: version(name)
        for name in ("rsq-stream", "torch", "numba", "numpy", "transformers")
    }
