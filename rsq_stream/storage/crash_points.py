"""The seam that every change on disk passes through, so that tests can stop it.

A step is named before and after it happens: ``write``, ``sync``, ``rename``,
``sync folder``, ``remove``, ``commit``. An observer may raise, or end the process:
that is how crash safety is tested step by step. Without observers it costs nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Observer = Callable[[str, str, tuple[Path, ...]], None]
"""Called with ``before`` or ``after``, the step's kind, and the paths it touches."""

_observers: list[Observer] = []


@contextmanager
def crash_point(kind: str, *paths: Path) -> Iterator[None]:
    """Mark one step; a failed one has no ``after``."""
    for observer in _observers:
        observer("before", kind, paths)
    yield
    for observer in _observers:
        observer("after", kind, paths)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Tell an observer of every step until the end of the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
