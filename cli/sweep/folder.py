"""The folder of a sweep: what its runs found, and those that are not finished.

::

    FILE.sweep/
        lock
        model.json           sha256 of the model's files, by their size and times
        results/KEY.json     one per finished run, named by all that decides it
        runs/KEY/            an unfinished run: task.json, log.txt, the model so far

A result is one file, written whole or not at all; it is never written again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsq_stream.errors import ScratchError, UsageError
from rsq_stream.storage import atomic

if TYPE_CHECKING:
    from rsq_stream.checkpoint.shards import Checkpoint

_LOCK, _MODEL, _RESULTS, _RUNS = "lock", "model.json", "results", "runs"
_OWN = {_LOCK, _MODEL, _MODEL + atomic.PARTIAL, _RESULTS, _RUNS}
TASK, LOG, OUTPUT = "task.json", "log.txt", "model"
"""In the folder of a run: what to do, what it said, the quantized model."""


class SweepFolder:
    """A sweep's folder; it belongs to this process while it is entered."""

    def __init__(self, path: Path) -> None:
        """Look at a folder; nothing is written.

        Raises
        ------
        UsageError
            It is no folder, or holds what no sweep put there.
        """
        self.path = path
        self._lock = -1
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file; give a folder with --output")
        if path.is_dir():
            with atomic.error_context(path):
                foreign = sorted({entry.name for entry in path.iterdir()} - _OWN)
            if foreign:
                raise UsageError(
                    f"{path}: the folder of a sweep must be new or a sweep's, it holds"
                    f" {foreign[0]}; give another --output"
                )

    def __enter__(self) -> "SweepFolder":
        for folder in (self.path, self.path / _RESULTS, self.path / _RUNS):
            atomic.make_folder(folder)
        with atomic.error_context(self.path):
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._unlock()
                raise ScratchError(
                    f"{self.path}: another sweep is working here; wait for it, stop it,"
                    " or give another --output"
                ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    def _unlock(self) -> None:
        os.close(self._lock)
        self._lock = -1

    @property
    def is_new(self) -> bool:
        """Whether no run ever began here."""
        runs, results = self.path / _RUNS, self.path / _RESULTS
        return not any(
            any(folder.iterdir()) for folder in (runs, results) if folder.is_dir()
        )

    def run_folder(self, key: str) -> Path:
        """Return the folder of a run, there or not."""
        return self.path / _RUNS / key

    def result_path(self, key: str) -> Path:
        """Return the file of a run's result, there or not."""
        return self.path / _RESULTS / f"{key}.json"

    def result(self, key: str) -> dict[str, Any] | None:
        """Return what a run found; None where it is not finished.

        Raises
        ------
        ScratchError
            The file is not what was written.
        """
        path = self.result_path(key)
        if not path.is_file():
            return None
        with atomic.error_context(path):
            content = path.read_bytes()
        try:
            found = json.loads(content)
            for name in ("perplexity", "bits_per_weight", "seconds"):
                float(found[name])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ScratchError(
                f"{path}: is not what was written; remove it to run that once more"
            ) from error
        return dict(found)

    def state(self, key: str) -> str:
        """Say where a run stands: ``finished``, ``unfinished`` or ``new``."""
        if self.result_path(key).is_file():
            return "finished"
        return "unfinished" if self.run_folder(key).is_dir() else "new"

    def begin(self, key: str, task: Mapping[str, Any]) -> Path:
        """Make a run's folder, or go on with it; gives its task's file."""
        folder = self.run_folder(key)
        atomic.make_folder(folder)
        atomic.write_file(folder / TASK, _json(task))
        return folder / TASK

    def clean(self) -> None:
        """Remove the folders of finished runs whose model is not to be kept."""
        with atomic.error_context(self.path):
            keys = sorted(entry.name for entry in (self.path / _RUNS).iterdir())
        for key in keys:
            found = self.result(key)
            if found is not None and not found.get("output"):
                atomic.remove_tree(self.run_folder(key))

    def model_sha256(self, checkpoint: "Checkpoint", *, keep: bool) -> str:
        """Hash the model's files: names and contents.

        Files are known by size and times, or by what the hub says of them, so that
        their contents are read once. With ``keep`` that is noted in the folder.
        """
        from rsq_stream.checkpoint.files import SIDE_FILES

        files = checkpoint.files
        known = self._known_files()
        contents = {}
        small = [name for name in SIDE_FILES if files.exists(name)]
        for name in sorted({*checkpoint.shards, *small}):
            stamp = files.stamp(name)
            entry = f"{files.where}/{name}, {stamp.text}"
            sha256 = stamp.sha256 or known.get(entry)
            contents[name] = sha256 or atomic.sha256_of(files.path(name))
            known[entry] = contents[name]
        if keep and known != self._known_files():
            atomic.write_file(self.path / _MODEL, _json(known))
        line = json.dumps(contents, sort_keys=True)
        return hashlib.sha256(line.encode()).hexdigest()

    def _known_files(self) -> dict[str, str]:
        try:
            found = json.loads((self.path / _MODEL).read_bytes())
            return {str(name): str(sha256) for name, sha256 in found.items()}
        except (OSError, ValueError, AttributeError):
            return {}  # the files are hashed again


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
