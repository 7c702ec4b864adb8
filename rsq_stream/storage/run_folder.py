"""The work folder of a run: lock, journal, activation slots.

It exists from the first second of a run until the output is whole. A second run
on it is refused while the first one lives; the lock dies with its owner.
"""

import fcntl
import json
import os
from pathlib import Path

from rsq_stream.errors import PlanMismatchError, ScratchError
from rsq_stream.storage import atomic
from rsq_stream.storage.journal import NAME as JOURNAL
from rsq_stream.storage.journal import Journal


class RunFolder:
    """An open work folder that belongs to this process."""

    def __init__(self, path: Path, plan_json: str, plan_sha256: str) -> None:
        """Make the folder, or go on in it if it holds a run of the same plan.

        Raises
        ------
        PlanMismatchError
            The folder holds a run of another plan; every differing field is named.
        ScratchError
            Another process has the folder, or it cannot be written.
        """
        self.path = path
        with atomic.explained(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        self.journal = Journal(path / JOURNAL)
        before = self.journal.get("plan")
        self.resumed = before is not None
        if before is None:
            self.journal.put({"plan": plan_json, "plan_sha256": plan_sha256})
        elif before != plan_json:
            self.close()
            raise PlanMismatchError(mismatch(path, before, plan_json))

    def _locked(self) -> int:
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
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

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the journal and give the lock back."""
        self.journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Remove the folder: the output is whole."""
        self.close()
        atomic.remove_tree(self.path)


def mismatch(path: Path, before: str, now: str) -> str:
    """Say in one line which fields of two plans differ, and the ways out."""
    old, new = json.loads(before), json.loads(now)
    differing = [
        f"{field} was {old.get(field)!r} and is now {new.get(field)!r}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]
    return (
        f"{path}: holds an unfinished run of another plan: {'; '.join(differing)};"
        " --restart starts over, the old values go on"
    )
