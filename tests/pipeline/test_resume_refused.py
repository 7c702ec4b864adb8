"""What a resume refuses, what it says then, and what ``--restart`` does about it."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsq_stream.calibration.windows import Windows
from rsq_stream.errors import (
    Interrupted,
    OutputError,
    PlanMismatchError,
    RsqError,
    ScratchError,
)
from rsq_stream.events import BlockFinished, Event, StageStarted
from rsq_stream.storage import atomic
from rsq_stream.storage.work_folder import WorkFolder
from tests.pipeline.test_resume import RUN, SMALL
from tests.support.toy import Recorder, contents, run_toy, toy_checkpoint, toy_windows

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("refused") / "toy", **SMALL)


@pytest.fixture(scope="module")
def whole(toy: Path) -> Files:
    run_toy(toy, toy.with_name("whole"), **RUN)
    return contents(toy.with_name("whole"))


RESTART: dict[str, Any] = RUN | {"options": {"restart": True}}


def interrupted(toy: Path, output: Path, **settings: Any) -> None:
    """Leave a run behind that has done its first block."""
    stop = threading.Event()

    def listener(event: Event) -> None:
        if isinstance(event, BlockFinished):
            stop.set()

    with pytest.raises(Interrupted):
        run_toy(toy, output, listener=listener, stop=stop, **RUN | settings)


def test_another_plan_is_refused_and_restart_takes_it(
    toy: Path, tmp_path: Path
) -> None:
    output, other = tmp_path / "out", RUN | {"bits": 5, "seed": 3}
    interrupted(toy, output)
    before = contents(output)
    message = r"another plan: bits was 3 and is now 5; seed was 0 and is now 3; windows"
    with pytest.raises(PlanMismatchError, match=message):
        run_toy(toy, output, **other)
    assert contents(output) == before
    summary = run_toy(toy, output, **other | {"options": {"restart": True}})
    assert summary.resumed_at == 0
    run_toy(toy, tmp_path / "fresh" / "out", **other)
    assert contents(output) == contents(tmp_path / "fresh" / "out")
    assert not (tmp_path / "out.work").exists()


def test_one_other_calibration_token_is_refused(toy: Path, tmp_path: Path) -> None:
    windows = toy_windows(64, 5, 16, 0)
    interrupted(toy, tmp_path / "out", windows=windows)
    other_BT = windows.window_BT.clone()
    other_BT[3, 7] = (other_BT[3, 7] + 1) % 64
    message = (
        r"plan: windows_sha256 \(the calibration tokens\) was '\w+' and is now '\w+';"
        r" --restart starts over, the old values go on$"
    )
    with pytest.raises(PlanMismatchError, match=message):
        run_toy(toy, tmp_path / "out", **RUN, windows=Windows(other_BT, 1))
    run_toy(toy, tmp_path / "out", **RUN, windows=windows)


@pytest.mark.parametrize("options", [{}, {"restart": True}])
def test_a_foreign_file_is_refused_and_kept(
    toy: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.md").write_text("years of work")
    message = r"out: the output folder must be new or empty, it holds thesis.md;"
    with pytest.raises(OutputError, match=message):
        run_toy(toy, output, **RUN, options=options)
    assert contents(output) == {"thesis.md": b"years of work"}
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("options", [{}, {"restart": True}])
def test_a_finished_output_is_never_touched(
    toy: Path, whole: Files, tmp_path: Path, options: dict[str, Any]
) -> None:
    run_toy(toy, tmp_path / "out", **RUN)
    message = r"out: the output folder must be new or empty, it holds a finished out"
    with pytest.raises(OutputError, match=message):
        run_toy(toy, tmp_path / "out", **RUN, options=options)
    assert contents(tmp_path / "out") == whole
    assert not (tmp_path / "out.work").exists()


def test_a_file_in_the_outputs_place_is_refused(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"out: is a file; give a folder with --out"):
        run_toy(toy, tmp_path / "out", **RUN)
    assert (tmp_path / "out").read_text() == "a file"


def test_a_refusal_leaves_a_work_folder_that_was_there(
    toy: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.md").write_text("years of work")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RsqError):
        run_toy(toy, tmp_path / "out", **RUN, options={"work_dir": home})
    assert (home / "thesis.md").read_text() == "years of work"


@pytest.mark.parametrize("after", [1, 4])
def test_restart_after_a_stop_among_the_small_files(
    toy: Path,
    whole: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    write_file, written = atomic.write_file, []

    def stopped(path: Path, content: bytes) -> None:
        if path.parent.name == "out":
            written.append(path)
        if len(written) > after:
            raise KeyboardInterrupt
        write_file(path, content)

    monkeypatch.setattr(atomic, "write_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_toy(toy, tmp_path / "out", **RUN)
    monkeypatch.setattr(atomic, "write_file", write_file)
    run_toy(toy, tmp_path / "out", **RESTART)
    assert contents(tmp_path / "out") == whole


def test_restart_spares_a_live_run(toy: Path, whole: Files, tmp_path: Path) -> None:
    refused = []

    def listener(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.block == 0:
            with pytest.raises(ScratchError, match="is working here") as caught:
                run_toy(toy, tmp_path / "out", **RESTART)
            refused.append(caught)

    run_toy(toy, tmp_path / "out", listener=listener, **RUN)
    assert len(refused) == 1
    assert contents(tmp_path / "out") == whole


def test_restart_discards_only_what_its_run_wrote(toy: Path, tmp_path: Path) -> None:
    # The work folder is of a run into "out"; the model given now is another thing.
    interrupted(toy, tmp_path / "out")
    model = Path(shutil.copytree(toy, tmp_path / "model"))
    before = contents(model)
    options = {"work_dir": tmp_path / "out.work", "restart": True}
    with pytest.raises(RsqError):
        run_toy(toy, model, **RUN, options=options)
    assert contents(model) == before


def _lose_a_partial(output: Path) -> None:
    next(output.glob("*.partial")).unlink()


def _lose_a_shard(output: Path) -> None:
    next(output.glob("*.safetensors")).unlink()


def _lose_the_output(output: Path) -> None:
    output.rename(output.with_name("moved"))


@pytest.mark.parametrize("loss", [_lose_a_partial, _lose_a_shard, _lose_the_output])
def test_a_lost_output_is_noticed_before_the_next_block(
    toy: Path, tmp_path: Path, loss: Callable[[Path], None]
) -> None:
    # Not after hours, when the last shard is read back.
    interrupted(toy, tmp_path / "out")
    loss(tmp_path / "out")
    recorder = Recorder()
    with pytest.raises(OutputError, match=r"out"):
        run_toy(toy, tmp_path / "out", listener=recorder, **RUN)
    assert not [e for e in recorder.events if isinstance(e, StageStarted)]


def test_a_kept_work_folder_can_be_read(toy: Path, tmp_path: Path) -> None:
    run_toy(toy, tmp_path / "out", **RUN, options={"keep_work": True})
    with WorkFolder(tmp_path / "out.work") as folder:
        assert folder.has_run
