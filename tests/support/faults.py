"""Record a run step by step; then make the disk as a crash at any step leaves it.

The seam (``storage/crash_points.py``) names every step. A recording keeps the files as
they are at each of them: what a kill at that step leaves. A ledger follows what was
made durable: bytes since a file's last sync, names, renames and removals whose folder
was not synced are what a power cut may still undo, in any combination.
"""

import shutil
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rsq_stream.storage import crash_points
from tests.support.toy import run_toy

TOY: dict[str, Any] = {
    "width": 32,
    "heads": 2,
    "kv_heads": 1,
    "mlp": 44,
    "vocabulary": 64,
    "blocks": 3,
    "straddle": False,
}
RUN: dict[str, Any] = {
    "samples": 2,
    "expand": 2,
    "sequence_length": 16,
    "clip_steps": 4,
    "propagate": 0.5,
    "plan": {"shard_bytes": 9_000},
    "execution": {"in_flight": 2, "resident_units": 1},
}
Image = dict[Path, bytes | None]
"""Files by path with what is in them; None for a folder."""
_SQLITE = "journal.sqlite"
"""SQLite makes its own files durable; a power cut spares what it committed."""


def look(*folders: Path) -> Image:
    """Read all files of some folders."""
    found: Image = {}
    for folder in folders:
        for path in [folder, *sorted(folder.rglob("*"))]:
            try:
                found[path] = None if path.is_dir() else path.read_bytes()
            except FileNotFoundError:  # another thread removed it meanwhile
                continue
    return {path: content for path, content in found.items() if path.exists()}


def restore(image: Image, *folders: Path) -> None:
    """Make the folders hold what an image says, and nothing else."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(image):
        content = image[path]
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(content)


def blocks_done(image: Image) -> int:
    """Count the finished blocks that the journal in an image promises."""
    content = next((c for p, c in image.items() if p.name == _SQLITE and c), None)
    if content is None:
        return 0
    database = sqlite3.connect(":memory:")
    database.deserialize(content)
    try:
        (last,) = database.execute("SELECT MAX(block) FROM blocks").fetchone()
    except sqlite3.OperationalError:  # killed before its tables were made
        return 0
    finally:
        database.close()
    return 0 if last is None else int(last) + 1


@dataclass(frozen=True)
class Moment:
    """One step of a run, and the disk as it was."""

    when: str
    kind: str
    paths: tuple[Path, ...]
    site: str
    """Who asked for it: module and function that called the seam's function."""
    image: Image


class Recording:
    """A run with the disk at each of its steps."""

    def __init__(self, toy: Path, output: Path) -> None:
        self.folders = (output, output.with_name(output.name + ".work"))
        self.moments: list[Moment] = []
        self._kept: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        with crash_points.observing(self._see):
            run_toy(toy, output, **RUN)
        self.whole = look(output)

    def _see(self, when: str, kind: str, paths: tuple[Path, ...]) -> None:
        with self._lock:
            image: Image = {
                path: self._kept.setdefault(content, content) if content else content
                for path, content in look(*self.folders).items()
            }
            self.moments.append(Moment(when, kind, paths, _site(), image))


_WRAPPERS = ("contextlib", "jaxtyping", "beartype")


def _site() -> str:
    """Name the code that asked for a step: past the seam, ``atomic`` and contextlib."""
    frame: FrameType | None = sys._getframe(2)
    names: list[str] = []
    while frame is not None and len(names) < 2:
        module = frame.f_globals.get("__name__", "")
        if (
            module.partition(".")[0] not in _WRAPPERS
            and module != crash_points.__name__
        ):
            names.append(f"{module.rpartition('.')[2]}.{frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(names)


class Chooser(Protocol):
    """What decides about each thing that may be lost."""

    def __call__(self, what: str, choices: int) -> int:
        """Return one of ``choices``; 0 keeps the thing as it is."""
        ...


@dataclass
class Ledger:
    """What a power cut may undo; ``ignored`` syncs count as if they were not there."""

    ignored: str = ""
    durable: Image = field(default_factory=dict)
    dirty: set[Path] = field(default_factory=set)
    names: set[Path] = field(default_factory=set)
    renames: list[tuple[Path, Path, bytes | None]] = field(default_factory=list)
    removed: Image = field(default_factory=dict)
    _before: Image = field(default_factory=dict)

    def follow(self, moment: Moment) -> None:
        """Take one step into account."""
        now, before = moment.image, self._before
        renamed = moment.kind == "rename" and moment.when == "after"
        if renamed:
            source, target = moment.paths
            self.renames.append((source, target, before.get(target)))
            for known in (self.dirty, self.names):
                if source in known:
                    known.discard(source)
                    known.add(target)
            if source in self.durable:
                self.durable[target] = self.durable.pop(source)
        for path in now:
            if path.name.startswith(_SQLITE) or path.name == "lock":
                continue
            new = path not in before and not (renamed and path == moment.paths[1])
            if new:
                self.names.add(path)
                self.removed.pop(path, None)
            written = now[path] is not None and (new or now[path] != before.get(path))
            if written and not (renamed and path == moment.paths[1]):
                self.dirty.add(path)
        for path in before:
            if path not in now and not (renamed and path == moment.paths[0]):
                if not path.name.startswith(_SQLITE + "-"):
                    self.removed[path] = before[path]
                self.names.discard(path)
                self.dirty.discard(path)
        if moment.when == "after" and moment.site != self.ignored:
            self._synced(moment)
        self._before = now

    def _synced(self, moment: Moment) -> None:
        path = moment.paths[0]
        if moment.kind == "sync" and path in moment.image:
            self.dirty.discard(path)
            self.durable[path] = moment.image[path]
        elif moment.kind == "sync folder":
            self.names = {name for name in self.names if name.parent != path}
            self.renames = [made for made in self.renames if made[1].parent != path]
            self.removed = {
                gone: content
                for gone, content in self.removed.items()
                if gone.parent != path
            }

    def after_a_cut(self, image: Image, choose: Chooser) -> Image:
        """Return the disk as a power cut may leave it."""
        left = dict(image)
        for path in sorted(self.dirty & left.keys()):
            now, before = left[path], self.durable.get(path) or b""
            assert now is not None
            fate = choose(f"bytes of {path.name}", 4)
            if fate == 1:
                left[path] = before
            elif fate == 2:
                padded = before.ljust(len(now), b"\0")
                pairs = zip(now, padded, strict=False)
                left[path] = bytes(n if n == b else 0 for n, b in pairs)
            elif fate == 3:
                left[path] = now[: (len(before) + len(now)) // 2]
        for source, target, old in reversed(self.renames):
            if target in left and choose(f"rename to {target.name}", 2):
                left[source] = left.pop(target)
                if old is not None:
                    left[target] = old
        for path in sorted(self.names & left.keys()):
            if choose(f"name {path.name}", 2):
                for inside in [p for p in left if p == path or path in p.parents]:
                    del left[inside]
        for path, content in self.removed.items():
            if path.parent in left and choose(f"removal of {path.name}", 2):
                left.setdefault(path, content)
        return left


def replayed(recording: Recording, ignored: str = "") -> Iterator[tuple[int, Ledger]]:
    """Give, for each moment, the ledger as it stands then."""
    ledger = Ledger(ignored)
    for place, moment in enumerate(recording.moments):
        ledger.follow(moment)
        yield place, ledger


@contextmanager
def failing(at: int, error: OSError, *, short: bool = False) -> Iterator[list[str]]:
    """Have the n-th step fail; ``short`` leaves half of what it wrote."""
    done: list[str] = []
    before: dict[Path, bytes] = {}
    lock = threading.Lock()

    def strike(when: str, kind: str, paths: tuple[Path, ...]) -> None:
        with lock:
            done.append(f"{when} {kind} {paths[0].name}")
            wrote = kind == "write" and paths[0].is_file()
            if when == "before" and wrote:
                before[paths[0]] = paths[0].read_bytes()
            if len(done) - 1 != at:
                return
            if short and when == "after" and wrote:
                now = paths[0].read_bytes()
                old = before.get(paths[0], b"").ljust(len(now), b"\0")
                changed = [i for i in range(len(now)) if now[i] != old[i]]
                half = changed[len(changed) // 2] if changed else 0
                paths[0].write_bytes(now[:half] + old[half : len(now)])
            raise error

    with crash_points.observing(strike):
        yield done
