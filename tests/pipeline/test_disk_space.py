"""A disk that cannot hold the rest of a run is known before the run needs it."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rsq_stream.errors import DiskFullError, ScratchError
from rsq_stream.events import Event, StageStarted
from rsq_stream.pipeline import disk_space
from tests.pipeline.test_repair import RUN, stopped
from tests.pipeline.test_resume import SMALL
from tests.support.toy import (
    Recorder,
    contents,
    execution_for,
    options_for,
    plan_toy,
    run_toy,
    toy_checkpoint,
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(
        tmp_path_factory.mktemp("room") / "toy", blocks=3, straddle=False, **SMALL
    )


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def needed(toy: Path, output: Path) -> int:
    """Return what the planner wants for a whole run."""
    settings = {k: v for k, v in RUN.items() if k != "execution"}
    plan, _ = plan_toy(toy, **settings)
    made = execution_for(toy, plan, options_for(output))
    return made.output_bytes + made.small_bytes + made.scratch_bytes


def test_a_run_that_will_not_fit_is_refused_at_once(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "out", needed(toy, tmp_path / "out")
    free = whole - 10_000  # the lock file is there before the question is asked
    with_free(monkeypatch, free)
    recorder = Recorder()
    message = rf"{output}: \d+ more bytes will be needed .*, {free} are free;"
    with pytest.raises(ScratchError, match=message):
        run_toy(toy, output, listener=recorder, **RUN)
    assert recorder.events == []
    assert not output.exists()
    with_free(monkeypatch, whole)
    run_toy(toy, output, **RUN)


def test_what_is_there_already_is_not_needed_again(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "out", needed(toy, tmp_path / "out")
    stopped(toy, output, 2, "mlp in")
    with_free(monkeypatch, 10)
    with pytest.raises(ScratchError, match="more bytes will be needed") as caught:
        run_toy(toy, output, **RUN)
    found = re.search(r"out: (\d+) more", str(caught.value))
    assert found is not None
    left = int(found[1])
    assert left < whole - 20_000
    with_free(monkeypatch, left)
    run_toy(toy, output, **RUN)


def test_the_plan_is_enough(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and scratch never take more than what was said they would."""
    output, whole, most = tmp_path / "out", needed(toy, tmp_path / "out"), [0]

    def listener(event: Event) -> None:
        if isinstance(event, StageStarted):
            files = [*output.rglob("*"), *output.with_name("out.work").rglob("*")]
            most[0] = max(most[0], sum(path.stat().st_size for path in files))

    run_toy(toy, output, listener=listener, **RUN)
    assert 0 < most[0] <= whole
    assert sum(map(len, contents(output).values())) <= whole


def test_a_disk_that_fills_all_the_same_says_what_is_missing(
    toy: Path, tmp_path: Path
) -> None:
    settings = {k: v for k, v in RUN.items() if k != "execution"}
    plan, _ = plan_toy(toy, **settings)
    options = options_for(tmp_path / "out")
    made = execution_for(toy, plan, options)
    full = r"full; the rest of the run needs \d+ bytes at .*/out, \d+ are free$"
    with (
        pytest.raises(DiskFullError, match=full),
        disk_space.explaining_full_disk(made, options, lambda: 0),
    ):
        raise DiskFullError("full")
