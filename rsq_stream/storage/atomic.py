"""The one place that writes files: beside, fsync, rename, fsync the folder.

A name on disk either does not exist or holds what it should. The activation
cache writes its chunks itself (through Zarr) and has them made durable here.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rsq_stream.errors import DiskFullError, RsqError, ScratchError
from rsq_stream.storage.crash_points import crash_point

PARTIAL = ".partial"
"""Suffix of files that are not what their name says yet."""


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file so that its name never shows a part of it."""
    with error_context(path):
        partial = path.with_name(path.name + PARTIAL)
        with crash_point("write", partial):
            partial.write_bytes(content)
        sync_file(partial)
        rename(partial, path)


def make_folder(path: Path) -> None:
    """Make a folder with those it lies in, so that a power cut cannot undo it."""
    with error_context(path):
        if not path.is_dir():
            with crash_point("write", path):
                path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename a finished, fsynced file to its final name, durably."""
    with crash_point("rename", source, target):
        source.replace(target)
    sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Make a file's content, and its size, survive a power cut."""
    # Its times need not: they would cost a commit of the file system's journal.
    with crash_point("sync", path):
        _sync(path, os.O_RDONLY, getattr(os, "fdatasync", os.fsync))


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    with crash_point("sync folder", path):
        _sync(path, os.O_RDONLY | os.O_DIRECTORY, os.fsync)


def _sync(path: Path, flags: int, sync: Callable[[int], None]) -> None:
    descriptor = os.open(path, flags)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


class PartialFile:
    """A file of known size, filled piece by piece, that gets its name when full."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._partial = path.with_name(path.name + PARTIAL)
        self._dirty = False
        with error_context(path):
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            self._descriptor = os.open(self._partial, flags, 0o644)
            if os.fstat(self._descriptor).st_size != size:
                os.ftruncate(self._descriptor, size)

    def write(self, offset: int, content: memoryview) -> None:
        """Put bytes at an offset."""
        if offset < 0 or offset + len(content) > self.size:
            raise ValueError(f"{self.path}: bytes beyond the file's size")
        with error_context(self.path), crash_point("write", self._partial):
            while content:
                done = os.pwrite(self._descriptor, content, offset)
                offset, content = offset + done, content[done:]
        self._dirty = True

    def read(self, offset: int, length: int) -> bytes:
        """Read back what was written."""
        return os.pread(self._descriptor, length, offset)

    def sync(self) -> None:
        """Make everything written so far durable."""
        if self._dirty:
            with error_context(self.path):
                sync_file(self._partial)
                sync_folder(self.path.parent)
            self._dirty = False

    def commit(self) -> None:
        """Sync, close, and give the file its name."""
        self._dirty = True
        self.sync()
        self.close()
        with error_context(self.path):
            rename(self._partial, self.path)

    def close(self) -> None:
        """Close without renaming."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if folder.exists():
        with error_context(folder), crash_point("remove", folder):
            shutil.rmtree(folder)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    if path.exists():
        with error_context(path), crash_point("remove", path):
            path.unlink()


@contextmanager
def error_context(path: Path) -> Iterator[None]:
    """Turn the system's error into one line that says what to do."""
    try:
        yield
    except RsqError:
        raise
    except OSError as error:
        raise explanation(path, error) from error


def explanation(path: Path, error: OSError) -> ScratchError:
    """Return the error that says in one line what went wrong on disk and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(existing(path)).free
        return DiskFullError(
            f"{path}: the disk is full ({free} bytes free);"
            " make room and run the same command again, it goes on where it stopped"
        )
    return ScratchError(f"{path}: {error.strerror or error}")


def existing(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def sha256_of(path: Path) -> str:
    """Hash a whole file, reading it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
