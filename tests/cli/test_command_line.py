"""The command line: its surface, its output, and what Ctrl-C leaves behind."""

from pathlib import Path
from typing import Any

import pytest
import typer.main
from rsq_stream.cli.display.findings import far_above_peers, notices_of, warnings_of
from rsq_stream.cli.display.progress import Lines, LiveLine
from rsq_stream.cli.display.text import duration, size
from rsq_stream.cli.main import COMMANDS, bounded, explained, main, make_app
from rsq_stream.cli.options.quantize_options import QuantizeOptions
from rsq_stream.cli.options.resolve import prepare, settings_of

from rsq_stream import __version__
from rsq_stream.config.run_options import parse_size
from rsq_stream.config.settings import Settings
from rsq_stream.demo import MODEL
from rsq_stream.errors import Interrupted, UsageError
from rsq_stream.events import (
    BlockFinished,
    LinearRecord,
    Notice,
    RunStarted,
    StageStarted,
    UnitsDone,
)
from rsq_stream.planning.validate import require_consistent
from tests.support.cli_runs import Run, run_program

HEAVY = ("torch", "transformers", "numba", "zarr", "pyarrow")
JOB_FLAGS = """
    --act-order --allow-device-change --asymmetric --batch --bits --calibration
    --clip-exponent --damping --device --expand --no-act-order --no-refit --refit
    --sweeps --propagate-override --residual-correction --no-residual-correction
    --bpw --shrinkage --preset --head-bits --override
    --grid --group-scales --group-size --importance --importance-max --importance-min
    --importance-tokens --importance-chunks --importance-power --importance-visible
    --importance-transform --importance-quantile --importance-skip --importance-mask
    --importance-truncate --importance-bins --importance-reverse --importance-linears
    --importance-exact
    --evict-source --keep-work --method --output --propagate --ram --restart
    --revision --format
    --rotation --samples --seed --sequence-length --signed-scales --symmetric
    --threads --unsigned-scales --vram --work-dir
"""
SERVED_FLAGS = """
    --activation-bits --activation-group-size --activation-clip
    --activation-symmetric --activation-asymmetric
    --kv-bits --kv-clip --kv-symmetric --kv-asymmetric
"""
FLAGS = {
    "quantize": JOB_FLAGS + SERVED_FLAGS + "--dry-run",
    "plan": JOB_FLAGS + SERVED_FLAGS,
    "status": "",
    "inspect": "--all",
    "verify": "--against",
    "eval": """
        --against --bos --device --max-windows --no-bos --sample --sample-tokens
        --sequence-length --text --threads
    """
    + SERVED_FLAGS,
    "sweep": "--device --dry-run --keep-models --output --processes",
    "demo": "--bits --output --samples",
    "doctor": "--work-dir",
}
EVERYWHERE = "--debug --json --quiet"


def record(name: str, error: float, **changed: Any) -> LinearRecord:
    fields: dict[str, Any] = {
        "block": 0,
        "bits": 4,
        "group_size": 128,
        "rounding_error": 1.0,
        "kept_rounding": False,
        "damping": 0.01,
        "damping_attempts": 1,
        "dead_inputs": 0,
    }
    return LinearRecord(name=name, relative_error=error, **(fields | changed))


def test_flags_are_these() -> None:
    app = typer.main.get_command(make_app(debug=False))
    found = {
        name: {
            flag
            for parameter in command.params
            for flag in (*parameter.opts, *parameter.secondary_opts)
            if flag.startswith("--") and flag != "--help"
        }
        for name, command in app.commands.items()  # type: ignore[attr-defined]
    }
    assert found == {
        name: {*flags.split(), *EVERYWHERE.split()} for name, flags in FLAGS.items()
    }


def test_help_of_every_command_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from rsq_stream.cli.main import COMMANDS, main\n"
        "for name in (None, *COMMANDS):\n"
        "    try:\n"
        "        main([name, '--help'] if name else ['--help'])\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0, name\n"
        f"sys.exit(str([n for n in {HEAVY} if n in sys.modules] or '') or 0)\n"
    )
    done = run_program(program)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"rsq-stream {__version__}\n", "")


@pytest.mark.parametrize(
    ("typo", "meant"), [(["quantise"], "quantize"), (["plan", "x", "--bit"], "--bits")]
)
def test_typos_are_usage_errors(run: Run, typo: list[str], meant: str) -> None:
    code, out, err = run(*typo)
    assert (code, out) == (2, "")
    assert meant in err


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8GiB", 8 * 2**30),
        ("2g", 2 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 kib", 1536),
        ("4096", 4096),
    ],
)
def test_sizes(text: str, wanted: int) -> None:
    assert parse_size("--ram", text) == wanted


@pytest.mark.parametrize("text", ["", "lots", "-1", "0", "8GiBs", "1e9", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--ram must be a size such as 8GiB"):
        parse_size("--ram", text)


def test_sizes_and_times_read_well() -> None:
    assert [size(n) for n in (7, 2**20, 3 * 2**29)] == [
        "7 bytes",
        "1.0 MiB",
        "1.50 GiB",
    ]
    assert [duration(s) for s in (12.0, 300.0, 12000.0)] == ["12 s", "5 m", "3 h 20 m"]


def test_defaults_are_those_of_the_planner() -> None:
    assert settings_of(QuantizeOptions()) == Settings()


def test_a_file_leaves_no_path_in_the_plan() -> None:
    options = QuantizeOptions(calibration="/some/where.txt", device="cpu")
    job = prepare(str(MODEL), options, read_calibration=False)
    assert job.plan.calibration == "file"


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (
            QuantizeOptions(rotation="R1"),
            "--rotation must be one of portable, full, none, not R1",
        ),
        (
            QuantizeOptions(sequence_length=0),
            "--sequence-length must be 2 or more, not 0",
        ),
        (
            QuantizeOptions(symmetric=False, signed_scales=True),
            "--signed-scales needs --symmetric",
        ),
        (
            QuantizeOptions(importance_tokens=9),
            "^--importance-tokens needs --importance first-last-n or first-n$",
        ),
        (
            QuantizeOptions(importance="uniform", importance_chunks="0/2"),
            "^--importance-chunks needs --importance chunks$",
        ),
    ],
)
def test_options_that_make_no_sense(job: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        require_consistent(settings_of(job))


def test_a_linear_far_above_its_kind_is_named() -> None:
    usual = [record(f"model.layers.{n}.self_attn.q_proj", 0.01) for n in range(4)]
    far = record("model.layers.4.self_attn.q_proj", 0.0501)
    # Of another kind: its own median, so nothing stands out.
    other = [record(f"model.layers.{n}.mlp.down_proj", 0.5) for n in range(3)]
    assert far_above_peers([*usual, far, *other]) == [(far, 0.01)]
    assert far_above_peers([*usual, record("q_proj", 0.05)]) == []
    assert far_above_peers([]) == []
    assert warnings_of([*usual, *other]) == []
    [line] = warnings_of([*usual, far])
    assert "model.layers.4.self_attn.q_proj 0.0501 (median 0.0100)" in line
    assert line.startswith("1 of 5 linears")


def test_notices_count_what_the_solver_had_to_do() -> None:
    records = [
        record("a.q_proj", 0.1, kept_rounding=True),
        record("b.q_proj", 0.1, damping_attempts=2),
    ]
    job = QuantizeOptions(symmetric=False, device="cpu", kv_bits=4)
    plan = prepare(str(MODEL), job, read_calibration=False).plan
    lines = notices_of(plan, records)
    assert lines[0].startswith("1 of 2 linears kept their rounded codes")
    assert lines[1].startswith("1 of 2 linears needed more damping than 0.01")
    assert "dequantize=True" in lines[2]
    assert lines[3].startswith(
        "made for rounded activations (4-bit K and V, symmetric)"
    )


def test_one_plain_line_per_block(capsys: pytest.CaptureFixture[str]) -> None:
    show = Lines()
    records = (record("a.q_proj", 0.01), record("a.down_proj", 0.0412))
    for event in (
        RunStarted(blocks=3, first_block=1, tokens=64),
        Notice(text="a\nb"),
        StageStarted(block=1, stage="mlp in", units=2),
        UnitsDone(block=1, stage="mlp in", units=2, tokens=64),
        BlockFinished(block=1, seconds=12.4, records=records),
        BlockFinished(block=2, seconds=1.0, records=records),
    ):
        show(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "notice: going on after block 1 of 3",
        "notice: a b",
        "block 2/3  12.4 s  worst down_proj 0.0412  ETA 0 s",
        "block 3/3  1.0 s  worst down_proj 0.0412",
    ]


def test_the_live_line_takes_every_event() -> None:
    show = LiveLine()
    try:
        show(RunStarted(blocks=2, first_block=1, tokens=64))
        show(Notice(text="[red]not markup"))
        show(StageStarted(block=1, stage="mlp in", units=2))
        show(UnitsDone(block=1, stage="mlp in", units=1, tokens=64))
        show(BlockFinished(block=1, seconds=1.0, records=(record("q_proj", 0.1),)))
    finally:
        show.close()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--bits must be\n2 to 8"), 1, "error: --bits must be 2 to 8"),
        (Interrupted("stopped; the same command goes on"), 130, "stopped; the same"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
        (ZeroDivisionError("oh"), 1, "error: ZeroDivisionError: oh; run again with"),
    ],
)
def test_every_error_is_one_line(error: BaseException, code: int, line: str) -> None:
    text, found = explained(error)
    assert found == code
    assert text.startswith(line)
    assert "\n" not in text


def test_debug_shows_the_error_itself(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        main(["--debug", "plan", str(MODEL), "--bits", "9"])
    with pytest.raises(UsageError):
        main(["plan", str(MODEL), "--bits", "9", "--debug"])

    def broken() -> None:
        raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError):
        bounded(broken, debug=True)()
    with pytest.raises(typer.Exit):
        bounded(broken, debug=False)()
