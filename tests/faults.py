"""Kill a run at its n-th step on disk, pull the plug, fill the disk; then resume.

    python -m tests.faults FOLDER KIND STEP...

Runs in a process of its own: it forks a child per fault, so that torch is loaded
once. The seam (``storage/steps.py``) names every step; at step n the child dies, or
the step fails. For ``power`` what was not made durable is lost: bytes written since
a file's last sync are cut, zeroed or undone, and so are renames whose folder was
not synced.
Prints one JSON line per step: how the child ended, and whether the resumed output
has the bytes of the uninterrupted one.
"""

import errno
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from rsq_stream.errors import ScratchError
from rsq_stream.storage.steps import observed
from tests.toy import contents, run_toy, toy_checkpoint

DIED = 77
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
    "plan": {"shard_bytes": 9_000},
    "execution": {"in_flight": 2, "resident_units": 1},
}


class Ledger:
    """What a power cut may still undo, byte by byte."""

    def __init__(self) -> None:
        self.unsynced: dict[Path, None] = {}
        self.durable: dict[Path, bytes] = {}
        self.renames: list[tuple[Path, Path]] = []

    def __call__(self, when: str, kind: str, paths: tuple[Path, ...]) -> None:
        # A write counts from before it happens: it may be half done.
        if (when, kind) == ("before", "write"):
            self.unsynced[paths[0]] = None
        elif (when, kind) == ("after", "sync") and paths[0].is_file():
            self.unsynced.pop(paths[0], None)
            self.durable[paths[0]] = paths[0].read_bytes()
        elif (when, kind) == ("after", "rename"):
            source, target = paths
            self.renames.append((source, target))
            if source in self.unsynced:
                self.unsynced[target] = self.unsynced.pop(source)
            if source in self.durable:
                self.durable[target] = self.durable.pop(source)
        elif (when, kind) == ("after", "sync folder"):
            self.renames = [pair for pair in self.renames if pair[1].parent != paths[0]]

    def lose(self, chooser: random.Random) -> None:
        """Keep, undo or zero what was not synced; undo or keep unsynced renames."""
        for path in list(self.unsynced):
            if not path.is_file():
                continue
            now, before = path.read_bytes(), self.durable.get(path, b"")
            fate = chooser.choice(("keep", "undo", "zero", "cut"))
            if fate == "undo":
                path.write_bytes(before)
            elif fate == "zero":
                padded = before.ljust(len(now), b"\0")
                path.write_bytes(
                    bytes(
                        new if new == old else 0
                        for new, old in zip(now, padded, strict=False)
                    )
                )
            elif fate == "cut":
                path.write_bytes(
                    now[: chooser.randint(min(len(before), len(now)), len(now))]
                )
        for source, target in reversed(list(self.renames)):
            if target.exists() and chooser.random() < 0.5:
                target.rename(source)


class Fault:
    """Counts steps and strikes at one of them."""

    def __init__(self, kind: str, at: int) -> None:
        self.count = 0
        self._kind = kind
        self._at = at
        self._ledger = Ledger()

    def __call__(self, when: str, step: str, paths: tuple[Path, ...]) -> None:
        self._ledger(when, step, paths)
        self.count += 1
        if self.count - 1 != self._at:
            return
        if self._kind in ("ENOSPC", "EIO"):
            number = getattr(errno, self._kind)
            raise OSError(number, os.strerror(number))
        if self._kind == "power":
            self._ledger.lose(random.Random(self._at))
        os._exit(DIED)


def in_child(toy: Path, output: Path, fault: Fault | None) -> int:
    """Run in a fork; gives its exit code: 0 done, 1 refused in one line, 77 died."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with observed(fault or Fault("none", -1)):
                run_toy(toy, output, **RUN)
            code = 0
        except ScratchError as error:
            code = 1 if "\n" not in str(error) else 4
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps_of_a_run(toy: Path, output: Path) -> int:
    """Count the steps of a run in one go."""
    counter = Fault("none", -1)
    with observed(counter):
        run_toy(toy, output, **RUN)
    return counter.count


def _state(output: Path, wanted: dict[str, bytes]) -> tuple[bool, bool]:
    """Whether the output has the bytes it should, and the work folder is gone."""
    work = output.with_name(output.name + ".work")
    same = output.exists() and contents(output) == wanted
    return same, not (work / "journal.sqlite").exists()


def main() -> None:
    """Try each step that is named; with none, print how many there are."""
    folder, kind, steps = Path(sys.argv[1]), sys.argv[2], list(map(int, sys.argv[3:]))
    torch.set_num_threads(1)
    toy, whole = folder / "toy", folder / "whole"
    if not toy.exists():
        toy_checkpoint(toy, **TOY)
    if not steps:
        shutil.rmtree(whole, ignore_errors=True)
        sys.stdout.write(f"{steps_of_a_run(toy, whole)}\n")
        return
    wanted = contents(whole)
    for at in steps:
        output = folder / f"{kind}-{at}"
        first = in_child(toy, output, Fault(kind, at))
        # Death after the very last step leaves nothing to resume.
        complete = _state(output, wanted) == (True, True)
        second = 0 if complete else in_child(toy, output, None)
        same, clean = _state(output, wanted)
        found = {"step": at, "first": first, "second": second}
        sys.stdout.write(json.dumps(found | {"same": same, "clean": clean}) + "\n")
        sys.stdout.flush()
        if same and clean:
            shutil.rmtree(output)


if __name__ == "__main__":
    main()
