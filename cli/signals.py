"""Ctrl-C and SIGTERM: the first asks for a stop, the second does not wait for it."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130
"""Exit code of everything that Ctrl-C ended."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ASKED = b"\nstopping at the next safe point; Ctrl-C again stops at once\n"
# The cursor comes back too: a progress bar may have hidden it.
_AT_ONCE = (
    b"\x1b[?25h\nstopped at once; the same command goes on after the last finished"
    b" block\n"
)


class StopRequest:
    """While it is entered, signals set ``event`` in place of raising."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        # os.write, as sys.stderr may be in the middle of a line of its own.
        if self.event.is_set():
            os.write(2, _AT_ONCE if os.isatty(2) else _AT_ONCE[7:])
            os._exit(INTERRUPTED)  # durable state needs no goodbye
        self.event.set()
        os.write(2, _ASKED)
