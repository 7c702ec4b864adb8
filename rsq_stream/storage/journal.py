"""What is done, durably: one SQLite file in the work folder.

A stage or block is done when its row is committed, after the bytes it names are
fsynced.
Rollback journal and synchronous=FULL: WAL fails on network file systems.
"""

import errno
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsq_stream.errors import ScratchError
from rsq_stream.storage import atomic
from rsq_stream.storage.crash_points import crash_point
from rsq_stream.storage.journal_schema import SCHEMA, TABLES

NAME = "journal.sqlite"


@dataclass(frozen=True)
class SourceRecord:
    """What is known of the source by content."""

    files: Mapping[str, tuple[str, str]]
    """Stamp, and sha256 or an empty string, by file."""
    tensors: Mapping[str, str]
    """sha256 by tensor."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a stage or a block wrote, durably, before it is committed."""

    chunks: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Checksums by slot and unit."""
    linears: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What was done to each linear, by its full name."""
    tensors: Mapping[str, int] = field(default_factory=dict)
    """Checksums of the output's tensors."""
    source: SourceRecord | None = None
    """What was learnt of the source's content."""


class Journal:
    """The record of one run; every method commits before it returns."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        with self._explained():
            if read_only:
                address = f"{path.resolve().as_uri()}?mode=ro"
                self._database = sqlite3.connect(address, uri=True, timeout=10)
                return
            self._database = sqlite3.connect(path, timeout=10)
            self._database.execute("PRAGMA journal_mode = DELETE")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(SCHEMA)
        self._require_sound()

    def _require_sound(self) -> None:
        """Refuse a journal whose rows are not those of its last commit."""
        kept = self._rows("SELECT sha256 FROM digest")
        with self._explained():
            found = self._digest()
        empty = not any(self._rows(f"SELECT 1 FROM {name} LIMIT 1") for name in TABLES)
        if (kept and kept[0][0] != found) or not (kept or empty):
            self.close()
            raise ScratchError(
                f"{self.path}: the journal is damaged (its rows are not those that were"
                " committed); --restart starts over"
            )

    def _digest(self) -> str:
        """Return the sha256 of all rows, in an order that SQLite cannot change."""
        digest = hashlib.sha256()
        for name in TABLES:
            digest.update(name.encode())
            for row in self._database.execute(f"SELECT * FROM {name} ORDER BY 1, 2"):
                digest.update(repr(row).encode())
        return digest.hexdigest()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def get(self, key: str) -> str | None:
        """Return a fact about the run, None where it is not written."""
        rows = self._rows("SELECT value FROM run WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def put(self, facts: Mapping[str, str]) -> None:
        """Write facts about the run, all of them or none."""
        with self._transaction() as database:
            database.executemany(
                "INSERT OR REPLACE INTO run VALUES (?, ?)", facts.items()
            )

    def finish_block(
        self,
        block: int,
        progress: Progress,
        *,
        seconds: float,
        timings: Iterable[tuple[str, float, int, int]] = (),
    ) -> None:
        """Commit a block, with the chunks of each slot that now holds its outputs.

        The caller has fsynced the chunks and the tensors before. ``timings`` are what
        each stage took: seconds, peak bytes of the host, and of the GPU.
        """
        with self._transaction() as database:
            self._put(block, progress)
            database.execute("DELETE FROM stages")
            database.execute(
                "INSERT OR REPLACE INTO blocks VALUES (?, ?)", (block, seconds)
            )
            database.executemany(
                "INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?, ?)",
                [(block, *timing) for timing in timings],
            )

    def finish_stage(self, block: int, stage: int, progress: Progress) -> None:
        """Commit a stage of a block, with the chunks of every slot it wrote.

        The caller has fsynced the chunks and the tensors before.
        """
        with self._transaction() as database:
            self._put(block, progress)
            database.execute(
                "INSERT OR REPLACE INTO stages VALUES (?, ?)", (block, stage)
            )

    def _put(self, block: int, progress: Progress) -> None:
        """Write what stages and blocks have in common, within a transaction."""
        database = self._database
        if progress.source:
            self._put_source(progress.source)
        for slot, sums in progress.chunks.items():
            database.execute("DELETE FROM chunks WHERE slot = ?", (slot,))
            database.executemany(
                "INSERT INTO chunks VALUES (?, ?, ?)",
                [(slot, unit, value) for unit, value in sums.items()],
            )
        database.executemany(
            "INSERT OR REPLACE INTO linears VALUES (?, ?, ?)",
            [(block, name, json.dumps(row)) for name, row in progress.linears.items()],
        )
        database.executemany(
            "INSERT OR REPLACE INTO tensors VALUES (?, ?)", progress.tensors.items()
        )

    def stages(self, block: int) -> int:
        """Return how many stages of a block are done."""
        rows = self._rows("SELECT COUNT(*) FROM stages WHERE block = ?", block)
        return int(rows[0][0])

    def forget_stages(
        self, block: int, stage: int, linears: Iterable[str], tensors: Iterable[str]
    ) -> None:
        """Take a block's stages back from ``stage`` on, with what they wrote."""
        with self._transaction() as database:
            database.execute(
                "DELETE FROM stages WHERE block = ? AND stage >= ?", (block, stage)
            )
            for table, names in (("linears", linears), ("tensors", tensors)):
                database.executemany(
                    f"DELETE FROM {table} WHERE name = ?",
                    [(name,) for name in names],
                )

    def put_source(self, source: SourceRecord) -> None:
        """Keep what is known of the source."""
        with self._transaction():
            self._put_source(source)

    def _put_source(self, source: SourceRecord) -> None:
        self._database.executemany(
            "INSERT OR REPLACE INTO source_files VALUES (?, ?, ?)",
            [(name, *known) for name, known in source.files.items()],
        )
        self._database.executemany(
            "INSERT OR REPLACE INTO source_tensors VALUES (?, ?)",
            source.tensors.items(),
        )

    def source_files(self) -> dict[str, tuple[str, str]]:
        """Return stamp and sha256 (empty where not known yet) of each source file."""
        rows = self._rows("SELECT name, stamp, sha256 FROM source_files ORDER BY name")
        return {name: (stamp, sha256) for name, stamp, sha256 in rows}

    def source_tensors(self) -> dict[str, str]:
        """Return the sha256 of each source tensor that was read."""
        return dict(self._rows("SELECT name, sha256 FROM source_tensors"))

    def finish_shard(self, name: str, size_bytes: int, sha256: str) -> None:
        """Commit an output shard that has its final name."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO shards VALUES (?, ?, ?)",
                (name, size_bytes, sha256),
            )

    def last_block(self) -> int | None:
        """Return the last finished block; -1 where only what is outside is written."""
        rows = self._rows("SELECT MAX(block) FROM blocks")
        return None if rows[0][0] is None else int(rows[0][0])

    @property
    def finished_blocks(self) -> int:
        """The number of blocks that are finished; what is outside them is none."""
        last = self.last_block()
        return 0 if last is None else last + 1

    def block_seconds(self) -> list[float]:
        """Return how long each finished block took, in order."""
        return [
            row[0] for row in self._rows("SELECT seconds FROM blocks ORDER BY block")
        ]

    def timings(self) -> list[tuple[str, float, int, int]]:
        """Return what each stage of each block took, as ``finish_block`` had it."""
        return self._rows(
            "SELECT stage, seconds, host_bytes, device_bytes FROM timings"
            " ORDER BY block, rowid"
        )

    def chunks(self, slot: str) -> dict[int, int]:
        """Return the checksums of a slot's chunks."""
        return dict(
            self._rows("SELECT unit, checksum FROM chunks WHERE slot = ?", slot)
        )

    def linears(self) -> dict[str, dict[str, Any]]:
        """Return the records of all solved linears, in the order of the blocks."""
        rows = self._rows("SELECT name, record FROM linears ORDER BY block, rowid")
        return {name: json.loads(record) for name, record in rows}

    def tensors(self) -> dict[str, int]:
        """Return the checksums of all tensors that are written."""
        return dict(self._rows("SELECT name, checksum FROM tensors"))

    def shards(self) -> dict[str, tuple[int, str]]:
        """Return size and sha256 of every shard that has its final name."""
        rows = self._rows("SELECT name, bytes, sha256 FROM shards ORDER BY name")
        return {name: (size, sha256) for name, size, sha256 in rows}

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._explained():
            return self._database.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with (
            self._explained(),
            crash_point("commit", self.path),
            self._database as database,
        ):
            yield database
            database.execute(
                "INSERT OR REPLACE INTO digest VALUES (0, ?)", (self._digest(),)
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with atomic.error_context(self.path):
                yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise atomic.explanation(self.path, full) from error
            raise ScratchError(
                f"{self.path}: the journal cannot be used ({error});"
                " --restart starts over"
            ) from error
