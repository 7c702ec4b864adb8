"""What this machine, or the container that this is, has free of host memory."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of a control group: its limit, what it has, and what of that a page cache gives back;
of version 2, and of version 1."""


def available_bytes(root: Path = Path("/")) -> int:
    """Give what may still be taken: by the machine, and by each control group.

    ``docker run --memory``, Kubernetes and systemd limit a group, of which the number
    of the machine knows nothing: beyond it the kernel kills. ``root`` is for tests.
    """
    return min([int(psutil.virtual_memory().available), *_left(root)])


def _left(root: Path) -> Iterator[int]:
    """Give what is left in each group that this process is in, if it has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if kinds and "memory" not in kinds.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        inner = PurePosixPath(path.lstrip("/"))
        # Inside a container the path may be the host's; its root is then the group's.
        for part in (inner, *inner.parents):
            found = _left_in(base / part)
            if found is not None:
                yield found


def _left_in(folder: Path) -> int | None:
    """Give what is left of a group's limit; None where it has none that can be read."""
    for limit, usage, inactive in _FILES:
        try:
            most = int((folder / limit).read_text())
            taken = int((folder / usage).read_text())
            pairs = map(str.split, (folder / "memory.stat").read_text().splitlines())
            cached = next(int(value) for key, value in pairs if key == inactive)
        except (OSError, ValueError, StopIteration):
            continue
        return max(0, most - max(0, taken - cached))
    return None
