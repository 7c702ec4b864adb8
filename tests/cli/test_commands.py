"""The commands on the bundled model, and what Ctrl-C leaves behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rsq_stream.cli.commands import demo as demo_command
from rsq_stream.cli.doctor import machine

from rsq_stream.demo import CALIBRATION, HELD_OUT, MODEL
from tests.support.cli_runs import LAUNCH, SMALL, Run, run_program


def test_dry_run_shows_the_plan_and_makes_nothing(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, out, err = run("quantize", MODEL, *SMALL, "--output", output, "--dry-run")
    assert (code, err) == (0, "")
    assert "bits per weight" in out
    assert list(tmp_path.iterdir()) == []


def test_plan_needs_no_calibration_text(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("plan", MODEL, "--output", tmp_path / "out", "--json")
    made = json.loads(out)
    assert code == 0
    assert set(made) == {
        *("plan", "execution", "plan_sha256", "predicted_seconds", "serving")
    }
    assert made["plan"]["calibration"] == "wikitext2"
    assert made["plan"]["windows_sha256"] == ""
    assert list(tmp_path.iterdir()) == []


def test_plan_names_fallbacks_and_rotation(run: Run, tmp_path: Path) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    _, out, _ = run("plan", MODEL, "--output", tmp_path / "out", "--group-size", "-1")
    assert f"hadamard-{config['hidden_size']}" in out
    assert "one scale a row" in out


def test_quantize_reports_what_it_made(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("quantize", MODEL, *SMALL, "--bits", "3", "--asymmetric")
    code, out, err = run(*arguments, "--output", output)
    assert code == 0
    assert err.count("\nblock ") + err.startswith("block ") == 4
    assert "notice: transformers loads asymmetric codes only with" in err
    assert f"rsq-stream eval {output}" in out
    assert "median" in out
    assert not output.with_name("out.work").exists()


def test_quantize_json_is_one_object(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, out, err = run(
        "quantize", MODEL, "--method", "rtn", "--output", output, "--json"
    )
    made = json.loads(out)
    assert code == 0
    assert "block " not in err
    assert made["output"] == str(output)
    files = [file.stat().st_size for file in output.iterdir()]
    seal = (output / "rsq_stream.sha256").stat().st_size
    assert made["output_bytes"] == sum(files) - seal
    assert len(made["linears"]) == 28


def test_bpw_measures_chooses_and_keeps_to_it(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    wanted = (MODEL, *SMALL, "--bpw", "8", "--group-size", "64", "--output", output)
    code, out, err = run("plan", *wanted)
    assert code == 0
    assert err.count("\nblock ") + err.startswith("block ") == 4
    assert "bits by block, for 8.0" in out or "bits by block, for 7.99" in out
    assert "as chosen" in out
    work = tmp_path / "out.work"
    assert [path.name for path in work.iterdir()] == ["bits"]
    _, state, _ = run("status", work)
    assert "what bits cost is measured" in state
    # Measured already: the run begins at once, and has that plan.
    plan_out = json.loads(run("plan", *wanted, "--json")[1])
    assert abs(plan_out["bits_choice"]["bits_per_weight"] - 8) <= 0.011
    code, out, err = run("quantize", *wanted)
    assert code == 0
    assert err.count("\nblock ") + err.startswith("block ") == 4
    manifest = json.loads((output / "rsq_stream.json").read_text())
    assert manifest["plan_sha256"] == plan_out["plan_sha256"]
    assert abs(manifest["bits_per_weight"] - 8) <= 0.011  # one step of this small model
    assert len({made["bits"] for made in manifest["linears"]}) > 1
    assert not work.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bpw", "8", "--bits", "3"), "--bpw chooses the bits: leave --bits out"),
        (("--bpw", "8", "--method", "rtn"), "--bpw measures on calibration text"),
        (("--bpw", "1"), "--bpw must be 7.67 to"),
    ],
)
def test_bpw_refuses_at_once(
    run: Run, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    output = ("--group-size", "64", "--output", tmp_path / "out")
    code, _, err = run("quantize", MODEL, *SMALL, *output, *options)
    assert code == 1
    assert err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_bpw_is_not_measured_for_an_output_that_is_there(
    run: Run, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    wanted = ("quantize", MODEL, *SMALL, "--bpw", "8", "--group-size", "64")
    code, _, err = run(*wanted, "--output", output)
    assert code == 1
    assert "must be new or empty, it holds notes.txt" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rotate_quantizes_nothing(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, out, _ = run("quantize", MODEL, "--method", "rotate", "--output", output)
    assert code == 0
    assert "relative error" not in out
    assert run("verify", output, "--against", MODEL)[0] == 0
    assert run("inspect", output)[0] == 0
    code, _, err = run("quantize", MODEL, "--method", "rotate", "--bits", "3")
    assert (code, err[:34]) == (1, "error: --method rotate quantizes n")


def test_all_linears_kept_is_no_error(run: Run, tmp_path: Path) -> None:
    wanted = ("quantize", MODEL, *SMALL, "--override", "*=16")
    code, out, _ = run(*wanted, "--output", tmp_path / "out")
    assert code == 0
    assert "relative error" not in out


def test_quiet_says_nothing(run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        "quantize", MODEL, "--method", "rtn", "--output", tmp_path / "out", "--quiet"
    )
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (code, out, lines) == (0, "", [])


def test_inspect(run: Run, quantized: Path) -> None:
    code, out, err = run("inspect", quantized)
    assert (code, err) == (0, "")
    assert "linear (the worst)" in out
    assert out.count("_proj") == 10
    assert run("inspect", quantized, "--all")[1].count("_proj") == 28
    made = json.loads(run("inspect", quantized, "--json")[1])
    assert len(made["linears"]) == 28


def test_eval_of_a_source_and_of_an_output(run: Run, quantized: Path) -> None:
    code, out, err = run(
        *("eval", quantized, "--text", HELD_OUT, "--against", MODEL, "--json"),
        *("--sequence-length", "64", "--max-windows", "4", "--device", "cpu"),
        *("--sample", "def ", "--sample-tokens", "2"),
    )
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["windows"] == 4
    assert found["kl_divergence"] > 0
    assert found["sample"].startswith("def ")
    limits = ("--sequence-length", "64", "--max-windows", "4", "--device", "cpu")
    code, out, _ = run("eval", MODEL, "--text", HELD_OUT, *limits)
    assert code == 0
    assert f"{found['against_perplexity']:.4f}" in out


def test_demo(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_command, "METHODS", ("rtn",))
    monkeypatch.setattr(demo_command, "_WINDOWS", 2)
    monkeypatch.setattr(demo_command, "_SAMPLE_TOKENS", 2)
    folder = tmp_path / "demo"
    code, out, _ = run("demo", "--bits", "2", "--output", folder, "--json")
    lines = json.loads(out)["lines"]
    assert code == 0
    assert [line["method"] for line in lines] == ["source", "rtn"]
    assert lines[1]["bytes"] < lines[0]["bytes"]
    assert (folder / "rtn-2bit" / "rsq_stream.json").is_file()


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_PROBE_BYTES", 2**24)
    code, out, err = run("doctor", "--work-dir", tmp_path, "--json")
    found = json.loads(out)
    assert (code, err, found["ok"]) == (0, "", True)
    assert list(tmp_path.iterdir()) == []
    kernels = [line for line in found["findings"] if "kernel" in line["name"]]
    assert kernels
    if not torch.cuda.is_available():
        assert "9 sources compile for sm_90" in kernels[0]["found"]
    code, out, _ = run("doctor", "--work-dir", tmp_path / "absent")
    assert code == 1
    assert "FAILED" in out


def test_second_signal_stops_at_once() -> None:
    program = (
        "import os, signal, time\n"
        "from rsq_stream.cli.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.event.wait(5)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(5)\n"
    )
    done = run_program(program)
    assert done.returncode == 130
    assert done.stderr.split("\n") == [
        "",
        "stopping at the next safe point; Ctrl-C again stops at once",
        "stopped at once; the same command goes on after the last finished block",
        "",
    ]


def test_ctrl_c_then_the_same_command_gives_the_same_bytes(
    run: Run, tmp_path: Path
) -> None:
    def arguments(name: str) -> list[str]:
        options = ["--samples", "16", "--sequence-length", "512", "--bits", "2"]
        options += ["--group-size", "64", "--calibration", str(CALIBRATION)]
        return ["quantize", str(MODEL), *options, "--output", str(tmp_path / name)]

    command = [sys.executable, "-P", "-c", LAUNCH, *arguments("stopped")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("block 1/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "stopping at the next safe point" in rest
    assert "stopped; the same command goes on after block" in rest.splitlines()[-1]
    assert "Traceback" not in rest

    code, out, _ = run("status", tmp_path / "stopped.work", "--json")
    found = json.loads(out)
    assert (code, found["process"]) == (0, None)
    assert 1 <= found["blocks_done"] < 4
    assert found["plan"]["bits"] == 2
    assert "blocks done" in run("status", tmp_path / "stopped.work")[1]

    code, _, err = run(*arguments("stopped"))
    assert code == 0
    assert f"notice: going on after block {found['blocks_done']} of 4" in err
    code, _, err = run(*arguments("straight"))
    assert (code, "going on" in err) == (0, False)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
