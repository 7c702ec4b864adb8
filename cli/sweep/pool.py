"""The processes of a sweep: one a place, until no run is left."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, Signals

from ..signals import INTERRUPTED
from .folder import LOG
from .places import Place
from .runs import SweepRun

_CHILD = "rsq_stream.cli.sweep.worker"
_LOOK_S = 0.05
"""Between two looks at the processes."""
_LOG_END_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run whose process ended by itself."""

    run: SweepRun
    place: Place
    failure: str | None
    """In one line; None if it is finished."""


def run_all(
    runs: Sequence[SweepRun],
    places: Sequence[Place],
    begin: Callable[[SweepRun, Place], Path],
    stop: threading.Event,
) -> Iterator[Ended]:
    """Yield each run as its process ends; ``begin`` makes the file of its task.

    Once ``stop`` is set, no run begins, and those that go on are asked to stop and
    waited for. Whatever else ends this, ends the processes at once.
    """
    waiting, free = list(runs), list(places)
    working: list[_Child] = []
    with _ended_in_any_case(working):
        while working or (waiting and not stop.is_set()):
            while waiting and free and not stop.is_set():
                run, place = waiting.pop(0), free.pop(0)
                working.append(_Child(run, place, begin(run, place)))
            if stop.is_set():
                for child in working:
                    child.ask_to_stop()
                time.sleep(_LOOK_S)
            else:
                stop.wait(_LOOK_S)
            for child in [child for child in working if child.has_ended]:
                working.remove(child)
                free.append(child.place)
                failure = child.failure()
                if failure is None or not child.was_asked_to_stop:
                    yield Ended(run=child.run, place=child.place, failure=failure)


@contextmanager
def _ended_in_any_case(working: "list[_Child]") -> Iterator[None]:
    try:
        yield
    finally:
        for child in working:
            child.kill()


class _Child:
    """The process of one run."""

    def __init__(self, run: SweepRun, place: Place, task: Path) -> None:
        self.run, self.place = run, place
        self.was_asked_to_stop = False
        self._log = task.with_name(LOG)
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C on the terminal reaches this process alone,
            # which asks the child. If this one dies, the child's stdin ends.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _CHILD, str(task)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | place.environment,
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask_to_stop(self) -> None:
        """Ask once for a stop at the next safe point."""
        if not self.was_asked_to_stop:
            self.was_asked_to_stop = True
            self._process.send_signal(SIGINT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def failure(self) -> str | None:
        """Describe in one line why the ended process did not do its run."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.returncode
        if code == 0:
            return None
        if code < 0:
            name = Signals(-code).name
            hint = ": was memory short?" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{hint}"
        if code == INTERRUPTED:
            return "its process was told to stop"
        return self._last_words() or f"its process ended with exit code {code}"

    def _last_words(self) -> str:
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _LOG_END_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1].removeprefix("error: ") if said else ""
