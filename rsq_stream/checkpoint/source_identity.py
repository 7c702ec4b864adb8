"""What the source is, by content: a resumed run goes on only from the same bytes.

A tensor is hashed when it is read, and checked when it is read again. Whole files
are hashed behind the compute (the hub tells theirs), all of them before the first
output shard gets its name. A resumed run trusts a file whose stamp is the one it
had (size, times of change; ``ctime`` cannot be put back), and hashes any other
anew.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from rsq_stream.checkpoint.files import SIDE_FILES, Stamp
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.errors import CheckpointError, Interrupted, PlanMismatchError
from rsq_stream.storage.journal import Journal, SourceRecord

_READ_BYTES = 1 << 22


class SourceIdentity:
    """The hashes of a run's source files and tensors, as far as they are known."""

    def __init__(
        self, checkpoint: Checkpoint, journal: Journal, check: Callable[[], None]
    ) -> None:
        """Compare the files with what an earlier part of the run saw of them.

        ``check`` is called between the pieces of a file; what it raises ends that.

        Raises
        ------
        PlanMismatchError
            A file is another one than the run began with, or may be.
        """
        self._checkpoint = checkpoint
        self._journal = journal
        self._check = check
        self._files = journal.source_files()
        self._tensors = journal.source_tensors()
        self._fresh: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._worker = ThreadPoolExecutor(1, "rsq-hash")
        self._hashing: Future[dict[str, str]] | None = None
        found = {name: checkpoint.files.stamp(name) for name in self._names()}
        if self._files:
            self._compare(found)
        self._files = {
            name: (stamp.text, stamp.sha256 or self._known(name))
            for name, stamp in found.items()
        }

    def _names(self) -> list[str]:
        files = self._checkpoint.files
        small = [name for name in SIDE_FILES if files.exists(name)]
        return [*self._checkpoint.shards, *small]

    def _known(self, name: str) -> str:
        return self._files[name][1] if name in self._files else ""

    def _compare(self, found: dict[str, Stamp]) -> None:
        for name in sorted(self._files.keys() ^ found.keys()):
            change = "is gone" if name in self._files else "is new"
            raise PlanMismatchError(self._drift(name, f"{change} since the run began"))
        for name, stamp in found.items():
            before, sha256 = self._files[name]
            if before == stamp.text and stamp.sha256 in (None, sha256):
                continue
            if not sha256:
                raise PlanMismatchError(
                    self._drift(
                        name,
                        f"was {before} and is now {stamp.text}, and the run was"
                        " stopped before it knew the file's content",
                    )
                )
            now = stamp.sha256 or self._sha256(name)
            if now != sha256:
                raise PlanMismatchError(
                    self._drift(name, f"its sha256 was {sha256} and is now {now}")
                )

    def _drift(self, name: str, what: str) -> str:
        return (
            f"{self._checkpoint.files.where}/{name}: {what}; --restart starts over, the"
            " old file goes on"
        )

    def start(self) -> None:
        """Hash the files that are not known yet, behind the compute."""
        missing = [name for name, (_, sha256) in self._files.items() if not sha256]
        self._hashing = self._worker.submit(self._hash_all, missing)

    def _hash_all(self, names: list[str]) -> dict[str, str]:
        return {name: self._sha256(name) for name in names}

    def _sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._checkpoint.files.path(name).open("rb", buffering=0) as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
                self._check()
                if self._closed.is_set():
                    raise Interrupted("stopped")
        return digest.hexdigest()

    def check(self, name: str, tensor: Tensor) -> None:
        """Hash a tensor that was just read; it must be what it was the last time.

        Raises
        ------
        CheckpointError
            An earlier part of the run read other bytes.
        """
        for _ in self.checked(name, [tensor]):
            pass

    def checked(self, name: str, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Hash a tensor that comes in parts, as they pass; ``check`` at its end."""
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
            yield part
        sha256 = digest.hexdigest()
        with self._lock:
            before = self._tensors.setdefault(name, sha256)
            if before == sha256:
                self._fresh[name] = sha256
        if before != sha256:
            shard = self._checkpoint.entry(name).shard
            what = f"the sha256 of {name} was {before} and is now {sha256}"
            raise CheckpointError(self._drift(shard, what))

    def unjournalled(self) -> SourceRecord:
        """Return what is to be journalled; never waits for the hashing."""
        if self._hashing is not None and self._hashing.done():
            self._take()
        with self._lock:
            fresh, self._fresh = self._fresh, {}
        return SourceRecord(dict(self._files), fresh)

    def complete(self) -> None:
        """Wait until every file is hashed, and journal that.

        Raises
        ------
        CheckpointError
            A file changed, or went away, while the run was reading it.
        """
        self._take()
        self._journal.put_source(self.unjournalled())

    def _take(self) -> None:
        if self._hashing is None:
            return
        try:
            found = self._hashing.result()
        except OSError as error:
            where = self._checkpoint.files.where
            raise CheckpointError(f"{where}: {error.strerror or error}") from error
        self._hashing = None
        for name, sha256 in found.items():
            stamp = self._files[name][0]
            if self._checkpoint.files.stamp(name).text != stamp:
                raise CheckpointError(self._drift(name, "changed while it was read"))
            self._files[name] = stamp, sha256

    def shards(self) -> dict[str, str]:
        """Return the sha256 of every shard, for the output's record of its source."""
        return {name: self._files[name][1] for name in self._checkpoint.shards}

    def close(self) -> None:
        """Stop hashing."""
        self._closed.set()
        self._worker.shutdown(cancel_futures=True)


def require_source(checkpoint: Checkpoint, shards: dict[str, str]) -> None:
    """Refuse a checkpoint that is not, byte for byte, the one with these hashes.

    Raises
    ------
    CheckpointError
        A shard is missing or has another sha256.
    """
    files = checkpoint.files
    for name, wanted in shards.items():
        if name not in checkpoint.shards:
            raise CheckpointError(f"{files.where}: {name} is missing")
        with files.path(name).open("rb") as file:
            found = files.stamp(name).sha256
            found = found or hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise CheckpointError(
                f"{files.where}/{name}: its sha256 is {found}, the output was made from"
                f" {wanted}"
            )
