"""The work folder of a run: lock, journal, activation slots.

It exists from the first second of a run until the output is whole. A second run
on it is refused while the first one lives; the lock dies with its owner.
"""

import fcntl
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from rsq_stream.errors import PlanMismatchError, ScratchError
from rsq_stream.storage import atomic
from rsq_stream.storage.journal import NAME as JOURNAL
from rsq_stream.storage.journal import Journal

_LOCK = "lock"
OWN_FILES = (_LOCK, JOURNAL, "windows.safetensors", "token-weights.safetensors")
SLOTS = ("even", "odd", "h", "full-even", "full-odd", "full-h")
MEASURED = "bits"
"""What ``--bpw`` measured: a work folder of its own, which outlives refusals."""
OWN_FOLDERS = (*SLOTS, MEASURED)
"""``OWN_FILES`` and these are all that a run puts here."""
_ENDINGS = ("", atomic.PARTIAL, "-journal")


class WorkFolder:
    """A work folder that belongs to this process as long as it is open."""

    def __init__(self, path: Path) -> None:
        """Make the folder if need be, and lock it.

        Raises
        ------
        ScratchError
            Another process has the folder, or it cannot be written.
        """
        self.path = path
        self._journal: Journal | None = None
        self._lock = -1
        atomic.make_folder(path)
        with atomic.error_context(path):
            foreign = sorted(entry.name for entry in self._foreign())
            if foreign and not self.has_run:
                raise ScratchError(
                    f"{path}: the work folder must be new or empty, it holds"
                    f" {foreign[0]}; give another --work-dir"
                )
            self._lock = self._locked()
        self._remove_leftovers()

    def _foreign(self) -> list[Path]:
        own = {name + ending for name in OWN_FILES for ending in _ENDINGS}
        own.update(OWN_FOLDERS)
        return [entry for entry in self.path.iterdir() if entry.name not in own]

    def _remove_leftovers(self) -> None:
        """Remove what a dead run had not finished writing here."""
        for name in OWN_FILES:
            atomic.remove_file(self.path / (name + atomic.PARTIAL))

    def _locked(self) -> int:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            raise ScratchError(
                f"{self.path}: process {owner or 'unknown'} is working here; wait for"
                " it, stop it, or give another --work-dir"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        return descriptor

    @property
    def has_run(self) -> bool:
        """Whether an unfinished run is here."""
        return (self.path / JOURNAL).exists()

    def recorded(self, key: str) -> str | None:
        """Return a fact of the unfinished run here; None if its journal is damaged."""
        try:
            with Journal(self.path / JOURNAL, read_only=True) as journal:
                return journal.get(key)
        except ScratchError:
            return None

    def clear(self) -> None:
        """Forget the unfinished run, for ``--restart``."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        # The journal first: without it nothing else means anything.
        self._remove_own(JOURNAL)
        self._remove_own(*OWN_FILES, *OWN_FOLDERS)

    def drop_slots(self) -> None:
        """Remove the activations: what they were for is done."""
        self._remove_own(*SLOTS)

    def _remove_own(self, *names: str) -> None:
        """Remove files or folders that a run put here; the lock stays."""
        for name in names:
            if name in OWN_FOLDERS:
                atomic.remove_tree(self.path / name)
            elif name != _LOCK:
                for ending in _ENDINGS:
                    atomic.remove_file(self.path / (name + ending))

    def open_journal(
        self, plan_json: str, plan_sha256: str, may_differ: Collection[str] = ()
    ) -> Journal:
        """Start the journal of a plan, or go on with it.

        The journal's own plan is the one to go on with: fields that ``may_differ``
        keep their first value.

        Raises
        ------
        PlanMismatchError
            The folder holds a run of another plan; every differing field is named.
        """
        self._journal = Journal(self.path / JOURNAL)
        before = self._journal.get("plan")
        if before is None:
            self._journal.put({"plan": plan_json, "plan_sha256": plan_sha256})
        elif differing := differing_fields(before, plan_json, may_differ):
            raise PlanMismatchError(mismatch(self.path, differing))
        return self._journal

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the journal and give the lock back; a folder without a run goes."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock >= 0:
            try:
                if not self.has_run:
                    self._remove_if_ours()
            finally:
                os.close(self._lock)
                self._lock = -1

    def _remove_if_ours(self) -> None:
        """Remove what a run left and the folder; one that holds anything else stays."""
        with atomic.error_context(self.path):
            if not self._foreign() and not (self.path / MEASURED).exists():
                self._remove_own(*OWN_FILES, *OWN_FOLDERS)
                atomic.remove_file(self.path / _LOCK)
                self.path.rmdir()

    def remove(self) -> None:
        """Remove all that the run put here: the output is whole."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        try:
            # The journal last: killed before that, a run finds its output whole.
            others = (name for name in OWN_FILES if name != JOURNAL)
            self._remove_own(*others, *OWN_FOLDERS)
            self._remove_own(JOURNAL)
        finally:
            self.close()


def differing_fields(
    before: str, now: str, may_differ: Collection[str]
) -> dict[str, tuple[object, object]]:
    """Return old and new value of each field in which two plans differ."""
    old, new = json.loads(before), json.loads(now)
    return {
        field: (old.get(field), new.get(field))
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field) and field not in may_differ
    }


def mismatch(path: Path, differing: Mapping[str, tuple[object, object]]) -> str:
    """Describe in one line which fields of two plans differ, and the ways out."""
    changes = [
        f"{field}{_MEANING.get(field, '')} was {old!r} and is now {new!r}"
        for field, (old, new) in differing.items()
    ]
    hint = ""
    if "device_kind" in differing:
        hint = "; --allow-device-change goes on here, to other bytes"
    return (
        f"{path}: holds an unfinished run of another plan: {'; '.join(changes)};"
        f" --restart starts over, the old values go on{hint}"
    )


_MEANING = {
    "source_sha256": " (the source's config and headers)",
    "windows_sha256": " (the calibration tokens)",
}
