"""Stopped anywhere and started again, a run gives the bytes of one in one go."""

import errno
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rsq_stream.errors import Interrupted, OutputError, PlanMismatchError, ScratchError
from rsq_stream.events import BlockFinished, Event, StageStarted
from rsq_stream.pipeline import block_setup
from rsq_stream.pipeline.block_solver import BlockSolver
from rsq_stream.storage import atomic
from rsq_stream.storage.crash_points import observing
from tests.support.toy import STAGES, Recorder, contents, run_toy, toy_checkpoint

SMALL: dict[str, Any] = {
    "width": 32,
    "heads": 2,
    "kv_heads": 1,
    "mlp": 44,
    "vocabulary": 64,
}
RUN: dict[str, Any] = {
    "sequence_length": 16,
    "clip_steps": 4,
    "cache_type": "bfloat16",
    "plan": {"shard_bytes": 9_000},
    "execution": {"in_flight": 3, "resident_units": 1},
}
OTHERWISE: dict[str, Any] = RUN | {
    "execution": {"in_flight": 1, "resident_units": 0},
    "options": {"workers": 2},
}
"""The same plan, run in another way: what may change on resume."""
SMALL_FILES = ["README.md", "config.json", "rsq_stream.json", "rsq_stream.sha256"]
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("resume") / "toy", **SMALL)


@pytest.fixture(scope="module")
def whole(toy: Path) -> tuple[Files, list[Event]]:
    """The files of a run in one go, and what it said."""
    recorder = Recorder()
    run_toy(toy, toy.with_name("whole"), listener=recorder, **RUN)
    files = contents(toy.with_name("whole"))
    assert set(SMALL_FILES) < files.keys()
    assert len([name for name in files if name.endswith(".safetensors")]) == 3
    return files, recorder.events


@pytest.fixture(scope="module")
def rounded(toy: Path) -> Files:
    """The files of a run that only rounds: quick enough to stop everywhere."""
    run_toy(toy, toy.with_name("rounded"), method="rtn", **RUN)
    return contents(toy.with_name("rounded"))


def assert_only_whole_files(output: Path, expected: Files) -> None:
    """What has its final name is what it will be; the rest is marked as partial."""
    found = contents(output) if output.exists() else {}
    for name, content in found.items():
        assert name.endswith(atomic.PARTIAL) or content == expected[name], name


def assert_done(output: Path, expected: Files) -> None:
    assert contents(output) == expected
    assert [entry.name for entry in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize("method", ["rsq", "rtn"])
@pytest.mark.parametrize("block", [0, 1])
def test_stopped_after_a_block(
    toy: Path,
    whole: tuple[Files, list[Event]],
    rounded: Files,
    tmp_path: Path,
    block: int,
    method: str,
) -> None:
    expected = whole[0] if method == "rsq" else rounded
    output, stop = tmp_path / "out", threading.Event()

    def listener(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.block == block:
            stop.set()

    call: dict[str, Any] = {"method": method, "listener": listener, "stop": stop}
    if block == 1:  # the last one: there is nothing left to stop
        assert run_toy(toy, output, **RUN, **call).resumed_at == 0
    else:
        message = r"^stopped; the same command goes on after block 1 of 2$"
        with pytest.raises(Interrupted, match=message):
            run_toy(toy, output, **RUN, **call)
        assert_only_whole_files(output, expected)
        assert not set(SMALL_FILES) & contents(output).keys()
        summary = run_toy(toy, output, method=method, **OTHERWISE)
        assert summary.resumed_at == 1
        assert len(summary.records) == 14
    assert_done(output, expected)


def test_stopped_before_it_begins(
    toy: Path, whole: tuple[Files, list[Event]], tmp_path: Path
) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match=r"goes on after block 0 of 2$"):
        run_toy(toy, tmp_path / "out", stop=stop, **RUN)
    assert run_toy(toy, tmp_path / "out", **RUN).resumed_at == 0
    assert_done(tmp_path / "out", whole[0])


def test_interrupted_at_every_event(
    toy: Path, whole: tuple[Files, list[Event]], tmp_path: Path
) -> None:
    expected, events = whole
    for place in range(len(events)):
        output = tmp_path / str(place) / "out"
        with pytest.raises(KeyboardInterrupt):
            run_toy(toy, output, listener=Recorder(place), **RUN)
        assert_only_whole_files(output, expected)
        assert not set(SMALL_FILES) & contents(output).keys()
        blocks = sum(isinstance(e, BlockFinished) for e in events[: place + 1])
        again = RUN if place % 2 else OTHERWISE
        assert run_toy(toy, output, **again).resumed_at == blocks
        assert_done(output, expected)


def test_a_full_disk_is_no_reason_to_start_over(
    toy: Path,
    whole: tuple[Files, list[Event]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, left, pwrite = tmp_path / "out", [9_000], os.pwrite

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        left[0] -= len(content)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, content, offset)

    for _ in range(2):
        left[0] += 10_000
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            message = r"model-0.*safetensors: the disk is full \(\d+ bytes free\); make"
            with pytest.raises(ScratchError, match=message):
                run_toy(toy, output, **RUN)
        assert_only_whole_files(output, whole[0])
    run_toy(toy, output, **RUN)
    assert_done(output, whole[0])


class Dead(BaseException):
    """The process is gone: neither this step nor any later one happens."""


@pytest.mark.parametrize("method", ["rsq", "rtn"])
def test_dead_at_any_step_on_disk(
    toy: Path,
    whole: tuple[Files, list[Event]],
    rounded: Files,
    tmp_path: Path,
    method: str,
) -> None:
    expected = whole[0] if method == "rsq" else rounded
    steps: list[tuple[Any, ...]] = []
    with observing(lambda *step: steps.append(step)):
        run_toy(toy, tmp_path / "counted", method=method, **RUN)
    removals = [place for place, step in enumerate(steps) if step[1] == "remove"]
    assert len(removals) >= 4
    # Rounding alone is quick; faults/test_faults.py kills calibrated runs anywhere.
    every = range(0, len(steps), 11) if method == "rtn" else range(0)
    for place in sorted({*every, *removals[:: 3 if method == "rsq" else 1]}):
        output, done = tmp_path / str(place) / "out", itertools.count()

        def die(*_: Any, place: int = place, done: Iterator[int] = done) -> None:
            if next(done) >= place:
                raise Dead

        with pytest.raises(Dead), observing(die):
            run_toy(toy, output, method=method, **RUN)
        assert_only_whole_files(output, expected)
        try:
            run_toy(toy, output, method=method, **OTHERWISE)
        except OutputError:
            # Nothing was left to do but to remove the work folder.
            assert contents(output) == expected, steps[place]
            assert place in removals
        assert_done(output, expected)


def test_what_is_solved_already_is_not_kept_in_memory(
    toy: Path,
    whole: tuple[Files, list[Event]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan counts what is left: after a resumed stage, and without kept ones."""
    output, stop = tmp_path / "out", threading.Event()
    held: list[tuple[int, list[str]]] = []
    original = block_setup.open_block

    def opened(*arguments: Any) -> BlockSolver:
        solver = original(*arguments)
        linears = [linear for stage in STAGES for linear in stage.linears]
        left = [linear.role for linear in linears if linear.name in solver.weights]
        held.append((solver.done, sorted(left)))
        return solver

    def listener(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "mlp out":
            stop.set()

    monkeypatch.setattr("rsq_stream.pipeline.quantize.open_block", opened)
    with pytest.raises(Interrupted):
        run_toy(toy, output, **RUN, listener=listener, stop=stop)
    run_toy(toy, output, **RUN)
    assert contents(output) == whole[0]
    every = sorted(linear.role for stage in STAGES for linear in stage.linears)
    assert held == [(0, every), (3, ["down"]), (0, every)]
    held.clear()
    kept = tmp_path / "kept"
    run_toy(toy, kept, **RUN, overrides=("[qkvo]_proj=16",))
    assert held == [(0, ["down", "gate", "up"])] * 2


def test_a_moved_work_folder_goes_on(
    toy: Path, whole: tuple[Files, list[Event]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_toy(toy, tmp_path / "out", listener=Recorder(16), **RUN)
    moved = (tmp_path / "out.work").rename(tmp_path / "elsewhere")
    run_toy(toy, tmp_path / "out", **RUN | {"options": {"work_dir": moved}})
    assert_done(tmp_path / "out", whole[0])


def test_another_kind_of_device_is_refused_unless_allowed(
    toy: Path, whole: tuple[Files, list[Event]], tmp_path: Path
) -> None:
    output, stop = tmp_path / "out", threading.Event()

    def listener(event: Event) -> None:
        if isinstance(event, BlockFinished):
            stop.set()

    with pytest.raises(Interrupted):
        run_toy(toy, output, listener=listener, stop=stop, **RUN)
    fields = {"device_kind": "another card", "tile_rows": 96}
    other: dict[str, Any] = RUN | {"plan": RUN["plan"] | fields}
    message = r"device_kind was 'cpu .*' and is now 'another card'; .*--allow-device-ch"
    with pytest.raises(PlanMismatchError, match=message):
        run_toy(toy, output, **other)
    with pytest.raises(PlanMismatchError, match="seed was 0"):
        run_toy(toy, output, **other, seed=1, options={"allow_device_change": True})
    run_toy(toy, output, **other, options={"allow_device_change": True})
    manifest = json.loads((output / "rsq_stream.json").read_bytes())
    change = {"from_block": 1, "device_kind": "another card"}
    assert manifest["device_changes"] == [change]
    # Here the bytes are the same, as the "other" device is this one.
    shards = [name for name in whole[0] if name.endswith(".safetensors")]
    assert {n: (output / n).read_bytes() for n in shards} == {
        n: whole[0][n] for n in shards
    }


def test_real_kills_at_random_times() -> None:
    soak = Path(__file__).parents[1] / "soak.py"
    done = subprocess.run(
        [sys.executable, str(soak), "--minutes", "0.2"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(", 0 refused\n")
