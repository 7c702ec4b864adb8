"""The work folder: one owner at a time, one plan, nothing of anybody else's."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rsq_stream.errors import PlanMismatchError, ScratchError
from rsq_stream.storage.journal import NAME
from rsq_stream.storage.work_folder import WorkFolder, differing_fields, mismatch

PLAN = json.dumps({"bits": 3, "method": "rsq", "seed": 0})
OWNER = """
import sys
from pathlib import Path
from rsq_stream.storage.work_folder import WorkFolder
folder = WorkFolder(Path(sys.argv[1]))
folder.open_journal(sys.argv[2], "sha")
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def owner(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process have the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path), PLAN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def start(path: Path, plan: str = PLAN) -> WorkFolder:
    folder = WorkFolder(path)
    folder.open_journal(plan, "sha")
    return folder


def test_it_is_made_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "work"
    with start(path) as folder:
        assert folder.has_run
        assert sorted(entry.name for entry in path.iterdir()) == [NAME, "lock"]
        folder.remove()
    assert not path.exists()


def test_an_unfinished_run_stays(tmp_path: Path) -> None:
    path = tmp_path / "work"
    with start(path):
        pass
    with WorkFolder(path) as folder:
        assert folder.has_run
        assert folder.open_journal(PLAN, "sha").get("plan") == PLAN


def test_a_folder_without_a_run_goes(tmp_path: Path) -> None:
    path = tmp_path / "work"
    with WorkFolder(path) as folder:
        assert not folder.has_run
    assert not path.exists()


def test_clearing_forgets_the_run_but_keeps_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "work"
    with start(path):
        (path / "even").mkdir()
        (path / "even" / "c.0.0.0").write_bytes(b"x")
        (path / "windows.safetensors").write_bytes(b"x")
    with WorkFolder(path) as folder:
        folder.clear()
        assert not folder.has_run
        assert [entry.name for entry in path.iterdir()] == ["lock"]
        with pytest.raises(ScratchError, match="is working here"):
            WorkFolder(path)
        folder.open_journal(json.dumps({"bits": 4}), "sha")


def test_another_process_is_refused_by_its_id(tmp_path: Path) -> None:
    path = tmp_path / "work"
    with owner(path) as process:
        message = (
            rf"^{path}: process {process.pid} is working here; wait for it, stop it,"
            r" or give another --work-dir$"
        )
        for _ in range(2):
            with pytest.raises(ScratchError, match=message):
                WorkFolder(path)
        assert (path / NAME).exists()


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    message = rf"process {os.getpid()} is working here"
    with start(tmp_path / "work"), pytest.raises(ScratchError, match=message):
        WorkFolder(tmp_path / "work")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_dies_with_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "work"
    with owner(path) as process:
        process.send_signal(how)
        assert process.wait(timeout=60) == -how
        with WorkFolder(path) as folder:
            assert folder.has_run
            assert (path / "lock").read_text() == str(os.getpid())


def test_another_plan_is_refused_by_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "work"
    with start(path):
        pass
    other = {"bits": 4, "method": "rsq", "seed": 1, "expand": 8}
    with pytest.raises(PlanMismatchError) as caught, WorkFolder(path) as folder:
        folder.open_journal(json.dumps(other), "other")
    assert str(caught.value) == (
        f"{path}: holds an unfinished run of another plan: bits was 3 and is now 4;"
        " expand was None and is now 8; seed was 0 and is now 1; --restart starts"
        " over, the old values go on"
    )
    with WorkFolder(path) as folder:
        assert folder.open_journal(PLAN, "sha").get("plan") == PLAN


def test_only_fields_that_differ_are_named(tmp_path: Path) -> None:
    old, new = '{"a": "x y", "b": null, "c": 1}', '{"a": "z", "b": null, "c": 2}'
    text = mismatch(tmp_path, differing_fields(old, new, {"c"}))
    assert "a was 'x y' and is now 'z'" in text
    assert "b was" not in text
    assert "c was" not in text
    assert "\n" not in text


def test_a_place_that_cannot_be_a_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "work"):
        with pytest.raises(ScratchError, match=rf"^{path}: (File exists|Not a dir)"):
            WorkFolder(path)


@pytest.mark.parametrize("end", ["close", "remove", "clear"])
def test_what_is_not_a_runs_is_never_removed(tmp_path: Path, end: str) -> None:
    # --work-dir may name a folder that is in use for something else.
    path = tmp_path / "home"
    (path / "thesis").mkdir(parents=True)
    (path / "thesis" / "chapter").write_text("years of work")
    (path / "notes").write_text("more")
    try:
        with WorkFolder(path) as folder:
            if end == "remove":
                folder.open_journal(PLAN, "sha")
                folder.remove()
            elif end == "clear":
                folder.clear()
    except ScratchError as error:
        assert str(path) in str(error)  # noqa: PT017  refusing is as good
    assert (path / "thesis" / "chapter").read_text() == "years of work"
    assert (path / "notes").read_text() == "more"
