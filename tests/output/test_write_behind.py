"""Codes are written behind the compute, and are there before their stage is done."""

import errno
import os
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsq_stream.errors import DiskFullError, ScratchError
from rsq_stream.storage import crash_points
from rsq_stream.storage.atomic import PARTIAL
from tests.support.crashes import Crash
from tests.support.fake_copies import take_a_gpus_way
from tests.support.faults import RUN, TOY, Recording, failing, look, replayed, restore
from tests.support.toy import contents, quick_folder, run_toy, toy_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = quick_folder() or tmp_path_factory.mktemp("codes")
    with tempfile.TemporaryDirectory(prefix="rsq-stream-", dir=folder) as made:
        yield Path(made)


@pytest.fixture(autouse=True)
def gpus_way(monkeypatch: pytest.MonkeyPatch) -> None:
    take_a_gpus_way(monkeypatch, 0)


@pytest.fixture(scope="module")
def crash(place: Path) -> Crash:
    """A run on a GPU's way, and what one without a GPU makes."""
    toy = toy_checkpoint(place / "toy", **TOY)
    run_toy(toy, place / "whole", **RUN)
    with pytest.MonkeyPatch.context() as patched:
        take_a_gpus_way(patched, 1)
        recording = Recording(toy, place / "out")
    return Crash(toy, recording, contents(place / "whole"))


def test_codes_are_written_by_a_thread_of_their_own(
    crash: Crash, tmp_path: Path
) -> None:
    """Between two commits all writes to shards come first, then their sync."""
    seen: list[tuple[str, str]] = []

    def see(when: str, kind: str, paths: tuple[Path, ...]) -> None:
        if when == "after" and (kind == "commit" or paths[0].name.endswith(PARTIAL)):
            seen.append((kind, threading.current_thread().name))

    with crash_points.observing(see):
        run_toy(crash.toy, tmp_path / "out", **RUN)
    assert contents(tmp_path / "out") == crash.whole
    behind = [n for n, (_, thread) in enumerate(seen) if thread.startswith("rsq-codes")]
    linears, tensors = 3 * 7, 3
    assert len(behind) >= linears * tensors  # and headers of shards that they begin
    for at in behind:
        after = [kind for kind, _ in seen[at + 1 :]]
        assert "sync" in after[: after.index("commit")]


def test_killed_anywhere_it_goes_on(crash: Crash) -> None:
    moments = crash.recording.moments
    for moment in random.Random(0).sample(moments, 15):
        crash.resumed(moment.image)


def test_what_is_journalled_survives_a_power_cut(crash: Crash) -> None:
    """All that was not made durable is lost, at every commit."""
    moments = crash.recording.moments
    for place, ledger in replayed(crash.recording):
        if (moments[place].when, moments[place].kind) == ("after", "commit"):
            image = moments[place].image
            crash.resumed(ledger.after_a_cut(image, lambda _, choices: choices > 1))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_is_said_in_one_line(crash: Crash, code: int) -> None:
    output = crash.recording.folders[0]
    shard_writes = [
        at
        for at, moment in enumerate(crash.recording.moments)
        if moment.kind == "write" and moment.paths[0].name.endswith(PARTIAL)
    ]
    for at in shard_writes[::25]:
        restore({}, *crash.recording.folders)
        error = OSError(code, os.strerror(code))
        with pytest.raises(ScratchError) as caught, failing(at, error):
            run_toy(crash.toy, output, **RUN)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, DiskFullError) == (code == errno.ENOSPC)
        crash.resumed(look(*crash.recording.folders))
