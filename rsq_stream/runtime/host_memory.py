"""Host memory: what is free, what this process held at most, and giving it back.

Under glibc's threshold (up to 32 MiB, by what was freed) tensors lie in the heap,
between small objects that stay; what a pass frees is then not what the next one can
use, and the heap grows from pass to pass.
"""

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of a control group: its limit, what it has, and what of that a page cache gives back;
of version 2, and of version 1."""


_EVERY_S = 0.02
_STATUS = Path("/proc/self/status")


class HostPeak:
    """Looks at resident memory now and then; where Linux knows a peak, that counts.

    The kernel's own mark is never taken back: others may read it too. So it says what
    a stage took only where it rose; elsewhere the highest of the looks does.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._highest = 0
        self._mark = _high_water()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def take(self) -> int:
        """Return the peak since the last call, in bytes, and begin anew."""
        now = int(self._process.memory_info().rss)
        mark = _high_water()
        peak = mark if mark > self._mark else max(self._highest, now)
        self._mark, self._highest = mark, now
        return peak

    def close(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            now = int(self._process.memory_info().rss)
            self._highest = max(self._highest, now)


def _high_water() -> int:
    """Return the kernel's mark of this process, 0 where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0


def trim_heap() -> None:
    """Make the allocator return its free pages; do nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes(root: Path = Path("/")) -> int:
    """Return what may still be taken: by the machine, and by each control group.

    ``docker run --memory``, Kubernetes and systemd limit a group, of which the number
    of the machine knows nothing: beyond it the kernel kills. ``root`` is for tests.
    """
    return min([int(psutil.virtual_memory().available), *_left(root)])


def _left(root: Path) -> Iterator[int]:
    """Return what is left in each group that this process is in, if it has a limit."""
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
    """Return what is left of a group's limit; None if none can be read."""
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
