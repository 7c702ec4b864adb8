"""The journal: a block is done with all that belongs to it, or not at all."""

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsq_stream.errors import ScratchError
from rsq_stream.storage.journal import NAME, Journal, Progress, SourceRecord
from tests.support.toy import quick_folder

BEFORE: dict[str, Any] = {
    "chunks": {0: 11, 1: 12},
    "linears": {"a": {"bits": 3}, "b": {"bits": 4}},
    "tensors": {"a.x": 1, "b.x": 2**32 - 1},
}
AFTER: dict[str, Any] = {
    "chunks": {0: 21},
    "linears": {"c": {"bits": 5}},
    "tensors": {"c.x": 3},
}


def finish(
    journal: Journal,
    block: int,
    slot: str,
    seconds: float,
    chunks: Any,
    linears: Any,
    tensors: Any,
) -> None:
    """Commit a block whose outputs lie in one slot."""
    progress = Progress(chunks={slot: chunks}, linears=linears, tensors=tensors)
    journal.finish_block(block, progress, seconds=seconds)


def state(journal: Journal) -> tuple[Any, ...]:
    return (
        journal.last_block(),
        journal.chunks("even"),
        journal.chunks("odd"),
        journal.linears(),
        journal.tensors(),
        journal.block_seconds(),
    )


def test_a_new_journal_is_empty(tmp_path: Path) -> None:
    with Journal(tmp_path / NAME) as journal:
        assert state(journal) == (None, {}, {}, {}, {}, [])
        assert journal.shards() == {}
        assert journal.get("plan") is None


def test_what_is_committed_is_there_after_reopening(tmp_path: Path) -> None:
    with Journal(tmp_path / NAME) as journal:
        journal.put({"plan": "{}", "blocks": "7"})
        journal.put({"blocks": "8"})
        finish(journal, -1, "even", 0.5, **BEFORE)
        finish(journal, 0, "odd", 1.5, **AFTER)
        journal.finish_shard("y", 2**40, "ff")
        journal.finish_shard("x", 10, "ee")
    with Journal(tmp_path / NAME) as journal:
        assert (journal.get("plan"), journal.get("blocks")) == ("{}", "8")
        assert journal.last_block() == 0
        assert journal.chunks("even") == {0: 11, 1: 12}
        assert journal.chunks("odd") == {0: 21}
        assert list(journal.linears()) == ["a", "b", "c"]
        assert journal.linears()["b"] == {"bits": 4}
        assert journal.tensors() == {"a.x": 1, "b.x": 2**32 - 1, "c.x": 3}
        assert journal.block_seconds() == [0.5, 1.5]
        assert journal.shards() == {"x": (10, "ee"), "y": (2**40, "ff")}


def test_a_slot_forgets_the_chunks_it_held_before(tmp_path: Path) -> None:
    with Journal(tmp_path / NAME) as journal:
        finish(journal, -1, "even", 0.0, **BEFORE)
        finish(journal, 0, "odd", 0.0, **AFTER)
        finish(journal, 1, "even", 0.0, {0: 31}, {}, {})
        assert journal.chunks("even") == {0: 31}
        assert journal.chunks("odd") == {0: 21}


@pytest.mark.parametrize("part", ["chunks", "linears", "tensors"])
def test_a_block_that_cannot_be_committed_leaves_nothing(
    tmp_path: Path, part: str
) -> None:
    broken = AFTER | {part: {"c": object()}}
    with Journal(tmp_path / NAME) as journal:
        finish(journal, 0, "even", 1.0, **BEFORE)
        before = state(journal)
        with pytest.raises((ScratchError, TypeError)):
            finish(journal, 1, "even", 1.0, **broken)
        assert state(journal) == before
    with Journal(tmp_path / NAME) as journal:
        assert state(journal) == before


KILLED = """
import json, os, signal, sys
from rsq_stream.storage.journal import Journal, Progress
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
journal = Journal(sys.argv[1])
json.dumps = die
progress = Progress(
    chunks={"even": {0: 21}}, linears={"c": {"bits": 5}}, tensors={"c.x": 3}
)
journal.finish_block(1, progress, seconds=1.0)
"""


def test_a_kill_inside_a_commit_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with Journal(path) as journal:
        finish(journal, 0, "even", 1.0, **BEFORE)
        before = state(journal)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    with Journal(path) as journal:
        assert state(journal) == before


def test_it_can_be_read_while_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with Journal(path) as writing, Journal(path, read_only=True) as reading:
        finish(writing, 0, "even", 1.0, **BEFORE)
        assert state(reading) == state(writing)
        with pytest.raises(ScratchError, match=r"journal cannot be used"):
            reading.put({"plan": "{}"})


def test_reading_makes_no_journal(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with pytest.raises(ScratchError, match=rf"^{path}: the journal cannot be used"):
        Journal(path, read_only=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "50%", "what?", "#1"])
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / NAME
    path.parent.mkdir()
    with Journal(path) as journal:
        journal.put({"plan": "{}"})
    with Journal(path, read_only=True) as journal:
        assert journal.get("plan") == "{}"


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_damaged_journal_is_explained(tmp_path: Path, damage: str) -> None:
    path = tmp_path / NAME
    with Journal(path) as journal:
        finish(journal, 0, "even", 1.0, **BEFORE)
    if damage == "text":
        path.write_text("this is no database, whatever it is called" * 40)
    else:
        os.truncate(path, 5000)
    message = rf"^{path}: the journal cannot be used \(.*\); --restart starts over$"
    with pytest.raises(ScratchError, match=message), Journal(path) as journal:
        state(journal)


def test_the_parent_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ScratchError, match=r"unable to open database file"):
        Journal(tmp_path / "absent" / NAME)


ROUND = st.tuples(
    st.dictionaries(st.integers(0, 5), st.integers(0, 2**32 - 1)),
    st.dictionaries(st.text(max_size=3), st.just({"bits": 3}), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 2**32 - 1), max_size=3),
)


@settings(deadline=None)
@given(st.lists(ROUND, max_size=6))
def test_replay_gives_what_a_dictionary_would(rounds: list[tuple[Any, ...]]) -> None:
    slots: dict[str, dict[int, int]] = {"even": {}, "odd": {}}
    tensors: dict[str, int] = {}
    linears: dict[str, Any] = {}
    with Journal(Path(":memory:")) as journal:
        for block, (chunks, made, written) in enumerate(rounds):
            slot = ("even", "odd")[block % 2]
            finish(journal, block, slot, 1.0, chunks, made, written)
            slots[slot] = chunks
            tensors |= written
            linears |= made
            assert journal.last_block() == block
        assert journal.chunks("even") == slots["even"]
        assert journal.chunks("odd") == slots["odd"]
        assert journal.tensors() == tensors
        assert journal.linears() == linears
        assert journal.block_seconds() == [1.0] * len(rounds)


STEPS = st.lists(
    st.sampled_from(["stage", "block", "shard", "source", "facts"]), max_size=14
)


def done_in_order(path: Path, kinds: list[str], first: int, last: int) -> None:
    """Do the steps from ``first`` up to ``last`` of a run, as a process would."""
    with Journal(path) as journal:
        for place in range(first, last):
            kind, block = kinds[place], kinds[:place].count("block")
            since = kinds[:place][::-1]
            stage = (since.index("block") if "block" in since else place) and sum(
                made == "stage"
                for made in since[: since.index("block") if "block" in since else None]
            )
            names = {f"{block}.{stage}": place}
            made: dict[str, Any] = {f"{block}.{stage}": {"bits": place}}
            if kind == "stage":
                chunks = {"h": {0: place}}
                progress = Progress(chunks=chunks, linears=made, tensors=names)
                journal.finish_stage(block, stage, progress)
            elif kind == "block":
                slot = ("even", "odd")[block % 2]
                finish(journal, block, slot, 1.0, {0: place}, made, names)
            elif kind == "shard":
                journal.finish_shard(f"s{place}", place, "ff")
            elif kind == "source":
                journal.put_source(SourceRecord({"x": ("now", "aa")}, {"t": "bb"}))
            else:
                journal.put({"output": str(place)})


def rows(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return list(database.iterdump())


@settings(deadline=None)
@given(STEPS, st.data())
def test_any_prefix_and_then_the_rest_is_the_whole(
    kinds: list[str], data: st.DataObject
) -> None:
    stop = data.draw(st.integers(0, len(kinds)), label="killed after")
    # A killed run repeats the step it was in: what it did not commit.
    with tempfile.TemporaryDirectory(dir=quick_folder()) as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        done_in_order(whole, kinds, 0, len(kinds))
        done_in_order(cut, kinds, 0, stop)
        done_in_order(cut, kinds, max(0, stop - 1), len(kinds))
        assert rows(cut) == rows(whole)


def test_a_changed_row_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with Journal(path) as journal:
        finish(journal, 0, "even", 1.0, **BEFORE)
    with closing(sqlite3.connect(path)) as database:
        database.execute(
            "UPDATE tensors SET checksum = checksum + 1 WHERE name = 'a.x'"
        )
        database.commit()
    message = rf"^{path}: the journal is damaged .*; --restart starts over$"
    with pytest.raises(ScratchError, match=message):
        Journal(path)
