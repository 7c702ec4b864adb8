"""The most memory that this process held, from one question to the next."""

import threading
from pathlib import Path

import psutil

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
        """Give the peak since the last call, in bytes, and begin anew."""
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
    """Give the kernel's mark of this process, 0 where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0
