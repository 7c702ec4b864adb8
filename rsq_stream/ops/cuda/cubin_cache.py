"""Compiled kernels, kept on disk by the content of what they were made of.

A file is named by the hash of source, defines, architecture and compiler, holds its
own digest before the cubin, and appears under its name only when it is whole: several
processes may fill one folder, and a damaged file is made anew.
"""

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from rsq_stream.ops.cuda.nvrtc import compile_cubin, compiler_version

_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Kernel:
    """One kernel, for one set of compile-time sizes."""

    source: str
    """Stem of a file in ``kernels/``."""
    function: str
    defines: tuple[str, ...] = ()
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""

    def __str__(self) -> str:
        return f"{self.source}.cu {self.function} {' '.join(self.defines)}".rstrip()


@cache
def source_of(name: str) -> str:
    """Read a source that is installed with the package."""
    return files("rsq_stream.kernels").joinpath(f"{name}.cu").read_text("utf-8")


def cache_folder() -> Path:
    """Say where cubins are kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rsq-stream" / "kernels"


def cubin(kernel: Kernel, architecture: str, folder: Path | None = None) -> bytes:
    """Return a kernel's cubin, from disk or compiled and put there.

    Raises
    ------
    KernelError
        It does not compile. A folder that cannot be written is no error: the next
        process compiles again.
    """
    source = source_of(kernel.source)
    parts = (source, *kernel.defines, architecture, compiler_version())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    path = (folder or cache_folder()) / f"{kernel.source}-{name[:32]}.cubin"
    kept = _read(path)
    if kept is not None:
        return kept
    made = compile_cubin(kernel.source, source, kernel.defines, architecture)
    with contextlib.suppress(OSError):
        _write(path, made)
    return made


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, body = content[:_DIGEST], content[_DIGEST:]
    return body if body and hashlib.sha256(body).digest() == digest else None


def _write(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).digest() + body)
        Path(beside).replace(path)
    except OSError:
        Path(beside).unlink(missing_ok=True)
        raise
