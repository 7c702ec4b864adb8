"""Killed or without power, wherever: the resumed run gives the same bytes.

``make test-faults`` tries every step; here some are sampled.
"""

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsq_stream.errors import RsqError
from tests.support.crashes import ALL, EXAMPLES, Crash, made_again
from tests.support.faults import Chooser, Ledger, Recording, replayed


def test_killed_at_every_step(crash: Crash) -> None:
    for moment in crash.recording.moments:
        events = crash.resumed(moment.image)
        assert made_again(events) == [], moment


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


def test_the_recording_is_of_a_whole_run(crash: Crash) -> None:
    assert {moment.kind for moment in crash.recording.moments} == {
        "write",
        "sync",
        "sync folder",
        "rename",
        "remove",
        "commit",
    }
