"""Read what comes next while something else computes."""

from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Generic, TypeVar

Part = TypeVar("Part")
_LOOK_S = 0.2


class BlockPrefetch(Generic[Part]):
    """Reads one part of many in a thread of its own, before anybody asks for it."""

    def __init__(
        self, read: Callable[[int], Part], check: Callable[[], None] = lambda: None
    ) -> None:
        """Take what reads a part; ``check`` may stop whoever waits for one."""
        self._read = read
        self._check = check
        self._ahead: _Reading[Part] | None = None

    def begin(self, index: int) -> None:
        """Begin to read a part, and forget another that nobody asked for."""
        self._ahead = _Reading(index, self._read)

    def take(self, index: int) -> Part:
        """Return a part: that which was read ahead, else it is read now.

        What went wrong ahead is tried again: whoever needs it is told by the same
        error as without reading ahead.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.index != index:
            del ahead  # its memory is wanted
            return self._read(index)
        while ahead.thread.is_alive():
            self._check()
            ahead.thread.join(_LOOK_S)
        return self._read(index) if ahead.part is None else ahead.part


class _Reading(Generic[Part]):
    """One part on its way."""

    def __init__(self, index: int, read: Callable[[int], Part]) -> None:
        self.index = index
        self.part: Part | None = None
        # No pool's: what a hub is slow to give must not hold up the end of a run.
        self.thread = Thread(target=self._run, args=(read,), daemon=True)
        self.thread.start()

    def _run(self, read: Callable[[int], Part]) -> None:
        with suppress(Exception):  # whoever needs the part asks again
            self.part = read(self.index)
