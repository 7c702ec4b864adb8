"""Whatever a run dies of, wherever, the resumed one gives the same bytes.

``make test-faults`` tries every step for every kind; here some kinds are sampled.
"""

import errno
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsq_stream.errors import DiskFullError, RsqError, ScratchError
from rsq_stream.events import Event, Notice
from tests.faults import (
    RUN,
    TOY,
    Chooser,
    Crash,
    Ledger,
    Recording,
    failing,
    look,
    replayed,
    restore,
)
from tests.toy import contents, quick_folder, run_toy, toy_checkpoint

ALL = bool(os.environ.get("RSQ_ALL_FAULTS"))
EXAMPLES = 1000 if ALL else 150


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: a sync costs nothing there."""
    folder = quick_folder() or tmp_path_factory.mktemp("faults")
    with tempfile.TemporaryDirectory(prefix="rsq-stream-", dir=folder) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def crash(place: Path) -> Crash:
    toy = toy_checkpoint(place / "toy", **TOY)
    run_toy(toy, place / "whole", **RUN)
    recording = Recording(toy, place / "out")
    assert len(recording.moments) > 400  # stages, chunks, shards, small files
    return Crash(toy, recording, contents(place / "whole"))


def made_again(events: list[Event]) -> list[str]:
    return [e.text for e in events if isinstance(e, Notice) and "made again" in e.text]


def test_killed_at_every_step(crash: Crash) -> None:
    crash.recording.folders[0]
    for moment in crash.recording.moments:
        events = crash.resumed(moment.image)
        assert made_again(events) == [], moment


def _stepwise(recording: Recording, stride: int) -> range:
    return range(0, len(recording.moments), 1 if ALL else stride)


@pytest.mark.parametrize(
    ("code", "short", "stride"),
    [(errno.ENOSPC, False, 4), (errno.EIO, False, 7), (errno.ENOSPC, True, 3)],
)
def test_a_step_that_fails(
    crash: Crash,
    code: int,
    short: bool,
    stride: int,
) -> None:
    failed, output = 0, crash.recording.folders[0]
    for at in _stepwise(crash.recording, stride):
        restore({}, *crash.recording.folders)
        try:
            with failing(at, OSError(code, os.strerror(code)), short=short) as done:
                run_toy(crash.toy, output, **RUN)
        except ScratchError as error:
            said, failed = str(error), failed + 1
            full = isinstance(error, DiskFullError)
        else:
            continue
        assert "\n" not in said
        assert full == (code == errno.ENOSPC)
        assert ("the rest of the run needs" in said) == full, done[-1]
        crash.resumed(look(*crash.recording.folders))
    assert failed > len(_stepwise(crash.recording, stride)) * 0.9


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_the_plug_is_pulled_anywhere(crash: Crash, step: int, fate: int) -> None:
    at, chooser = step % len(crash.recording.moments), random.Random(fate)
    ledger = _ledger_at(crash.recording, at)
    image = ledger.after_a_cut(
        crash.recording.moments[at].image, lambda _, choices: chooser.randrange(choices)
    )
    assert made_again(crash.resumed(image)) == []


def test_all_that_is_not_durable_is_lost(crash: Crash) -> None:
    for at, ledger in replayed(crash.recording):
        if ALL or at % 3 == 0:
            image = ledger.after_a_cut(crash.recording.moments[at].image, lambda *_: 1)
            assert made_again(crash.resumed(image)) == []


def _ledger_at(recording: Recording, at: int) -> Ledger:
    for place, ledger in replayed(recording):
        if place == at:
            return ledger
    raise AssertionError(at)


def _sites(recording: Recording) -> list[str]:
    return sorted({m.site for m in recording.moments if m.kind.startswith("sync")})


def test_no_sync_can_be_left_out(crash: Crash) -> None:
    sites = _sites(crash.recording)
    assert len(sites) >= 7, sites
    for site in sites:
        assert _fails_without(site, crash), f"needless: {site}"


def _fails_without(site: str, crash: Crash) -> bool:
    """Whether a power cut somewhere does harm once the syncs of a site are gone."""
    for lose in (_everything, _the_first_name):
        for at, ledger in replayed(crash.recording, site):
            moment = crash.recording.moments[at]
            # What a journal row or a name promises is at stake right after it.
            if moment.when == "after" and moment.kind in ("commit", "sync folder"):
                image = ledger.after_a_cut(moment.image, lose())
                try:
                    if made_again(crash.resumed(image)):
                        return True
                except (RsqError, AssertionError):
                    return True
    return False


def _everything() -> Chooser:
    return lambda what, choices: 1


def _the_first_name() -> Chooser:
    names: list[str] = []

    def choose(what: str, choices: int) -> int:
        if what.startswith("name"):
            names.append(what)
        return int(names == [what])

    return choose


def test_a_flipped_bit_is_mended_or_named(crash: Crash) -> None:
    chooser, ends = random.Random(0), {"same": 0, "mended": 0, "refused": 0}
    output, work = crash.recording.folders
    for _ in range(EXAMPLES):
        image = dict(chooser.choice(crash.recording.moments).image)
        files = [path for path, content in image.items() if content]
        if not files:
            continue
        path = chooser.choice(files)
        content = bytearray(image[path] or b"")
        content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
        image[path] = bytes(content)
        try:
            mended = made_again(crash.resumed(image))
        except AssertionError:
            # Damage in an output that was finished is verify's to find.
            if work.exists() or not (output / "rsq_stream.sha256").exists():
                raise
            continue
        except RsqError as error:
            named = path.name in str(error) or f"/{path.parent.name}:" in str(error)
            assert named, (path, error)  # noqa: PT017  either end is sound
            ends["refused"] += 1
            run_toy(crash.toy, output, options={"restart": True}, **RUN)
            assert contents(output) == crash.whole
        else:
            ends["mended" if mended else "same"] += 1
    assert min(ends.values()) > EXAMPLES / 50, ends


def test_the_recording_is_of_a_whole_run(crash: Crash) -> None:
    assert {moment.kind for moment in crash.recording.moments} == {
        "write",
        "sync",
        "sync folder",
        "rename",
        "remove",
        "commit",
    }
