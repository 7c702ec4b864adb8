"""The package in Python: what the command line does, with typed results."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import rsq_stream
from rsq_stream import RunOptions, Settings
from rsq_stream.demo import CALIBRATION, HELD_OUT, MODEL
from rsq_stream.errors import Interrupted, OutputError, UsageError
from rsq_stream.events import BlockFinished, Event, Notice, RunStarted
from tests.support.cli_runs import SMALL, Run
from tests.support.toy import contents

SETTINGS = Settings(bits=3, samples=8, sequence_length=64, calibration=str(CALIBRATION))


def options(output: Path, **more: Any) -> RunOptions:
    return rsq_stream.run_options(
        MODEL, SETTINGS, output=output, device="cpu", threads=1, **more
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of the API."""
    output = tmp_path_factory.mktemp("api") / "out"
    summary = rsq_stream.quantize(MODEL, SETTINGS, options(output))
    assert summary.output == output
    assert summary.resumed_at == 0
    assert len(summary.records) % 7 == 0
    sealed = {k: v for k, v in contents(output).items() if k != "rsq_stream.sha256"}
    assert summary.output_bytes == sum(map(len, sealed.values()))
    return output


def test_it_writes_the_bytes_of_the_command_line(
    made: Path, run: Run, tmp_path: Path
) -> None:
    command = (MODEL, "--bits", 3, *SMALL, "--output", tmp_path / "out")
    code, _, err = run("quantize", *command)
    assert code == 0, err
    assert contents(tmp_path / "out") == contents(made)


def test_events_come_by_a_callback_and_a_run_goes_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    stop = threading.Event()

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, BlockFinished):
            stop.set()

    call = (MODEL, SETTINGS, options(tmp_path / "out"))
    with pytest.raises(Interrupted, match="goes on after block 1 of"):
        rsq_stream.quantize(*call, listener=listen, stop=stop)
    assert isinstance(events[0], RunStarted)
    assert rsq_stream.quantize(*call).resumed_at == 1
    assert contents(tmp_path / "out") == contents(made)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")


def test_a_plan_reads_no_text_and_writes_nothing(tmp_path: Path) -> None:
    settings = Settings(bits=2, calibration=str(tmp_path / "absent.txt"))
    job = rsq_stream.plan(MODEL, settings, options(tmp_path / "out", ram="4GiB"))
    assert job.windows is None
    assert job.plan.bits == 2
    assert job.execution.output_bytes > 0
    assert job.options.ram_bytes == 4 << 30
    assert list(tmp_path.iterdir()) == []


def test_bits_are_chosen_for_a_size(tmp_path: Path) -> None:
    settings = Settings(
        bpw=9.0, samples=4, sequence_length=64, calibration=str(CALIBRATION)
    )
    job = rsq_stream.prepare(MODEL, settings, options(tmp_path / "out"))
    chosen, choice = rsq_stream.choose_bits(job, 9.0)
    assert choice.bits_per_weight == pytest.approx(9.0, abs=0.02)
    assert chosen.execution.bits_per_weight == pytest.approx(choice.bits_per_weight)
    assert chosen.plan.overrides


def test_an_evaluation_is_that_of_the_command_line(made: Path, run: Run) -> None:
    given: dict[str, Any] = {"max_windows": 4, "sequence_length": 128}
    found = rsq_stream.evaluate(made, HELD_OUT, against=MODEL, device="cpu", **given)
    command = ("--text", HELD_OUT, "--max-windows", 4, "--sequence-length", 128)
    code, out, err = run("eval", made, "--against", MODEL, *command, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["perplexity"] == found.evaluation.perplexity
    assert said["kl_divergence"] == found.evaluation.kl_divergence
    assert found.sequence_length == 128
    assert found.simulated == found.calibrated_for
    assert found.sample is None


def test_an_output_is_verified_against_its_source(made: Path, tmp_path: Path) -> None:
    found = rsq_stream.verify(made, against=MODEL)
    assert found.problems == []
    assert len(found.weight_errors) % 7 == 0
    with pytest.raises(OutputError, match="no finished output"):
        rsq_stream.verify(tmp_path)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bits": 3, "bpw": 3.0}, "^--bpw chooses the bits: leave --bits out$"),
    ({"grid": "e9p"}, "^--grid must be one of e8p, integer, nf, not e9p$"),
    ({"method": "rotate", "bits": 2}, "^--method rotate quantizes nothing"),
    ({"rotation": "R1"}, "^--rotation must be one of portable, full, none, not R1$"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_settings_that_exclude_each_other_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        rsq_stream.plan(MODEL, Settings(**changes), options(tmp_path / "out"))


def test_run_options_have_defaults_and_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = rsq_stream.run_options("some/model-1B", Settings(bits=2), device="cpu")
    assert found.output == Path("model-1B-rsq-2bit")
    assert found.work_dir == Path("model-1B-rsq-2bit.work")
    named = rsq_stream.run_options("m", Settings(method="rotate"), device="cpu")
    assert named.output == Path("m-rotate")
    named = rsq_stream.run_options("m", Settings(bpw=3.5), device="cpu")
    assert named.output == Path("m-rsq-3.5bpw")
    with pytest.raises(
        UsageError, match=r"^--vram is for a GPU, and this run computes"
    ):
        rsq_stream.run_options("m", Settings(), device="cpu", vram="8GiB")
    with pytest.raises(UsageError, match=r"^--ram must be a size such as 8GiB"):
        rsq_stream.run_options("m", Settings(), device="cpu", ram="much")


def test_a_warning_is_a_notice_that_says_so() -> None:
    assert not Notice(text="a").is_warning


def test_names_are_looked_up_when_asked_for() -> None:
    program = (
        "import sys, rsq_stream\n"
        "light = 'torch' not in sys.modules\n"
        "found = [getattr(rsq_stream, name) for name in rsq_stream.__all__]\n"
        "sys.exit(not (light and all(found)))\n"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = rsq_stream.absent
