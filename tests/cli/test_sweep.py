"""A real sweep of a toy, stopped and resumed; its table is what runs alone give."""

import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rsq_stream.cli.commands import sweep
from rsq_stream.cli.options.quantize_options import QuantizeOptions
from rsq_stream.cli.sweep import worker
from rsq_stream.cli.sweep.worker import task_of
from safetensors.torch import load_file, save_file

from rsq_stream.storage import atomic
from tests.support.cli_runs import Run
from tests.support.toy import toy_checkpoint, toy_tokenizer

TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 40
OPTIONS = {"bits": 2, "group-size": 32, "samples": 16, "sequence-length": 32}
EVAL = ("--sequence-length", "32", "--max-windows", "16")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, texts and the file of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    toy_checkpoint(folder / "toy", blocks=8, shards=1)
    toy_tokenizer(folder / "toy")
    (folder / "calibration.txt").write_text(TEXT)
    (folder / "held-out.txt").write_text(TEXT[::-1])
    settings = "\n".join(f"{name} = {value}" for name, value in OPTIONS.items())
    (folder / "s.toml").write_text(
        'model = "toy"\ntext = "held-out.txt"\ncalibration = "calibration.txt"\n'
        f"seeds = [0, 1]\n[settings]\n{settings}\n"
        "[eval]\nsequence-length = 32\nmax-windows = 16\n"
    )
    return folder


def alone(run: Run, place: Path, seed: int) -> dict[str, Any]:
    """Quantize and evaluate by the two commands, as one would without a sweep."""
    output = place / f"alone-{seed}"
    options = [part for n, v in OPTIONS.items() for part in (f"--{n}", v)]
    text = ("--calibration", place / "calibration.txt", "--device", "cpu")
    wanted = (*options, *text, "--seed", seed, "--output", output, "--json")
    code, out, _ = run("quantize", place / "toy", *wanted)
    assert code == 0
    made = json.loads(out)
    held_out = ("--text", place / "held-out.txt", *EVAL, "--device", "cpu", "--json")
    code, out, _ = run("eval", output, *held_out)
    assert code == 0
    return {**json.loads(out), "bits_per_weight": made["bits_per_weight"]}


def test_a_run_has_the_memory_of_its_place(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the file says how much."""
    asked: list[str | None] = []

    def run_all(missing: Any, places: Any, begin: Any, stop: Any) -> list[Any]:
        del stop
        for one in (places[0], dataclasses.replace(places[0], ram="123456789")):
            task = begin(missing[0], one)
            asked.append(json.loads(task.read_text())["job"]["ram"])
        return []

    monkeypatch.setattr(sweep, "run_all", run_all)
    text = (place / "s.toml").read_text()
    for name in ("toy", "calibration.txt", "held-out.txt"):
        text = text.replace(f'"{name}"', json.dumps(str(place / name)))
    for number, ram in enumerate(("", 'ram = "2GiB"\n')):
        path = tmp_path / f"{number}.toml"
        path.write_text(text.replace("[settings]\n", f"[settings]\n{ram}"))
        run("sweep", path, "--device", "cpu", "--processes", "1")
    assert asked == [None, "123456789", "2GiB", "2GiB"]


class CtrlC(threading.Thread):
    """Presses it once a run says a thing, after so many others are finished."""

    def __init__(self, folder: Path, finished: int, text: str) -> None:
        super().__init__()
        self._folder, self._finished, self._text = folder, finished, text
        self.pressed = False

    def run(self) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not self.pressed:
            time.sleep(0.005)
            done = {path.stem for path in self._folder.glob("results/*.json")}
            logs = [
                log.read_text()
                for log in self._folder.glob("runs/*/log.txt")
                if log.parent.name not in done
            ]
            if len(done) == self._finished and self._text in "".join(logs):
                self.pressed = True
                os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_sweep_goes_on_to_the_same_table(run: Run, place: Path) -> None:
    folder = place / "s.sweep"
    before = set(psutil.Process().children())

    # Stopped in the second run: the first is finished, and nothing goes on.
    watch = CtrlC(folder, 1, "block 1/8")
    watch.start()
    code, out, err = run("sweep", place / "s.toml", "--device", "cpu")
    watch.join()
    assert watch.pressed
    assert (code, out) == (130, "")
    assert "done: 1/2  settings, seed 0  perplexity" in err
    assert err.splitlines()[-1] == (
        "stopped with 1 of 2 runs finished; the same command goes on where each stopped"
    )
    assert set(psutil.Process().children()) <= before
    code, out, _ = run("sweep", place / "s.toml", "--dry-run", "--json")
    states = [made["state"] for made in json.loads(out)["runs"]]
    assert (code, states) == (0, ["finished", "unfinished"])
    [finished] = folder.glob("results/*.json")
    written = finished.stat().st_mtime_ns, finished.read_bytes()

    # It goes on where the run was stopped; what was finished is not run again.
    code, out, err = run("sweep", place / "s.toml", "--keep-models", "--device", "cpu")
    assert code == 0
    assert "notice: 2 runs, 1 of them finished" in err
    assert "notice: --keep-models: 1 finished runs have no model any more" in err
    assert err.count("done: ") == 1
    assert (finished.stat().st_mtime_ns, finished.read_bytes()) == written
    [log] = folder.glob("runs/*/log.txt")
    assert log.read_text().count("going on after block") == 1

    # The table is that of the two commands, run by hand.
    found = [alone(run, place, seed) for seed in (0, 1)]
    values = [made["perplexity"] for made in found]
    cells = out.splitlines()[1].split()
    assert cells[:5] == [
        "settings",
        "2",
        f"{statistics.mean(values):.3f}",
        f"{statistics.stdev(values):.3f}",
        f"{found[0]['bits_per_weight']:.2f}",
    ]
    assert values[0] != values[1]
    [model] = folder.glob("runs/*/model")
    assert contents(model) == contents(place / "alone-1")
    assert not model.with_name("model.work").exists()

    # A finished sweep starts nothing and says the same, in JSON too.
    code, again, _ = run("sweep", place / "s.toml", "--quiet", "--device", "cpu")
    assert (code, again.splitlines()) == (0, out.splitlines()[:2])
    code, out, err = run("sweep", place / "s.toml", "--json", "--device", "cpu")
    assert (code, err) == (0, "")
    [row] = json.loads(out)["rows"]
    assert [made["perplexity"] for made in row["runs"]] == values
    assert row["deviation"] == statistics.stdev(values)
    assert row["runs"][1]["output"] == str(model)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def task(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The task of a run by rounding, to be done in this process."""
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    job = QuantizeOptions(method="rtn", bits=4, group_size=32, device="cpu", threads=1)
    content = {
        "model": str(place / "toy"),
        "job": task_of(job),
        "text": str(place / "held-out.txt"),
        "eval": {"sequence_length": 32, "max_windows": 4, "bos": False},
        "about": {"name": "round", "seed": 0},
        "keep_model": False,
        "result": str(tmp_path / "result.json"),
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(content))
    return folder / "task.json"


@pytest.mark.parametrize("cut", ["quantized.json", "result.json"])
def test_a_run_killed_at_its_ends_goes_on(
    task: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = atomic.write_file

    def killed(path: Path, content: bytes) -> None:
        if path.name == cut:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(atomic, "write_file", killed)
    assert worker.main(task) == 130
    result = task.parent.with_name("result.json")
    assert not result.exists()
    monkeypatch.setattr(atomic, "write_file", write)
    assert worker.main(task) == 0
    found = json.loads(result.read_bytes())
    assert found["windows"] == 4
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["seconds"] > 0  # of the first process, which did all blocks
    assert sorted(path.name for path in task.parent.iterdir()) == [
        "model",
        "quantized.json",
        "task.json",
    ]


def test_a_run_that_fails_says_why(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(task.read_bytes())
    model = shutil.copytree(content["model"], tmp_path / "broken")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.5.mlp.down_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    task.write_text(json.dumps(content | {"model": str(model)}))
    assert worker.main(task) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {model}/model.safetensors: {name} holds NaN or inf")
    task.write_text(json.dumps({"model": "of another version"}))
    assert worker.main(task) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: KeyError: 'job'; please report"
