"""A chunk as a file of its own: bare bytes, past the page cache where possible.

That is what Zarr stores for an uncompressed chunk. Written in place, so that a slot
used again keeps its blocks on disk; whether a chunk is whole, its checksum tells.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 4096
"""What O_DIRECT asks of address, offset and length, on any disk we know."""
_DIRECT: int = getattr(os, "O_DIRECT", 0)


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


def aligned_empty(size_bytes: int) -> NDArray[np.uint8]:
    """Return a buffer that O_DIRECT can take; it holds whatever was there."""
    room = np.empty(size_bytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size_bytes]


def write_chunk(path: Path, content: NDArray[np.uint8], *, direct: bool) -> None:
    """Make the file hold these bytes and no more; durable after a sync.

    Raises
    ------
    OSError
        As the system says it.
    """
    flags = os.O_CREAT | os.O_WRONLY | _flag(len(content), direct=direct)
    descriptor = os.open(path, flags, 0o644)
    try:
        rest: memoryview = content.data
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if os.fstat(descriptor).st_size != len(content):
            os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


def read_chunk(
    path: Path,
    size_bytes: int,
    *,
    direct: bool,
    into: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Read a file; gives fewer bytes where it is shorter, and no more than asked for.

    ``into`` is an aligned buffer of that size, where there is one already.

    Raises
    ------
    OSError
        As the system says it.
    """
    descriptor = os.open(path, os.O_RDONLY | _flag(size_bytes, direct=direct))
    try:
        content, done = aligned_empty(size_bytes) if into is None else into, 0
        while done < size_bytes:
            count = os.readv(descriptor, [content[done:].data])
            if not count:
                break
            done += count
            if done % ALIGNMENT:
                break  # the end of a file that is too short
        return content[:done]
    finally:
        os.close(descriptor)


def _flag(size_bytes: int, *, direct: bool) -> int:
    """Return O_DIRECT where it is wanted and a chunk of this size can have it."""
    return _DIRECT if direct and size_bytes % ALIGNMENT == 0 else 0
