"""Parts of a sweep by themselves: its table, its places, its folder, its processes."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rsq_stream.cli.options.quantize_options import QuantizeOptions
from rsq_stream.cli.signals import INTERRUPTED
from rsq_stream.cli.sweep import places as sweep_places
from rsq_stream.cli.sweep import pool as sweep_pool
from rsq_stream.cli.sweep.folder import SweepFolder
from rsq_stream.cli.sweep.places import Place, places_for
from rsq_stream.cli.sweep.pool import run_all
from rsq_stream.cli.sweep.runs import SweepRun
from rsq_stream.cli.sweep.table import as_table, sweep_row

from rsq_stream.errors import ScratchError, UsageError
from rsq_stream.planning.devices import cores
from rsq_stream.storage import atomic
from tests.support.toy import open_toy, toy_checkpoint

OLD, NEW = "cuda 8.0, 108 multiprocessors", "cuda 9.0, 132 multiprocessors"


def result(
    perplexity: float, seconds: float = 1.0, bits: float = 3.0
) -> dict[str, Any]:
    values = {"perplexity": perplexity, "bits_per_weight": bits, "seconds": seconds}
    return {name: float(value) for name, value in values.items()}


def test_mean_and_sample_deviation() -> None:
    # By hand: mean 12, squares 4 + 0 + 4 = 8, over n - 1 = 2 is 4, its root 2.
    line = sweep_row("a", 3, {0: result(10, 2), 1: result(12, 3), 2: result(14, 10)})
    assert (line.perplexity, line.deviation, line.seconds) == (12, 2, 5)
    two = sweep_row("b", 2, {0: result(5.25, bits=3.1), 4: result(5.5, bits=3.3)})
    assert two.deviation == pytest.approx(0.1767766953, abs=1e-10)  # 0.25 / sqrt 2
    assert two.bits_per_weight == pytest.approx(3.2)
    assert sweep_row("c", 1, {3: result(7)}).deviation is None
    assert sweep_row("d", 2, {0: result(7), 1: result(float("inf"))}).deviation is None
    assert sweep_row("e", 2, {}).perplexity is None


def test_the_table() -> None:
    lines = [
        sweep_row("bits=2", 3, {n: result(10 + 2 * n, 60.04) for n in range(3)}),
        sweep_row("one", 1, {0: result(1234.5678, 0.26, 16)}),
        sweep_row("some", 3, {0: result(10.0), 2: result(10.0)}),
        sweep_row("none", 3, {}),
    ]
    assert as_table(lines).splitlines() == [
        "run      seeds  perplexity  deviation  bits/weight  seconds",
        "bits=2       3      12.000      2.000         3.00     60.0",
        "one          1    1234.568          -        16.00      0.3",
        "some    2 of 3      10.000      0.000         3.00      1.0",
        "none    0 of 3           -          -            -        -",
    ]


def test_places_on_the_cpu_share_the_cores() -> None:
    [one], left_out = places_for("cpu", None)
    assert (one.name, one.device, one.threads) == ("cpu", "cpu", cores())
    assert (one.environment, left_out) == ({}, ())
    many, _ = places_for("cpu", 3)
    assert [place.threads for place in many] == [max(1, cores() // 3)] * 3


def test_places_share_the_memory(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run asks the machine when it plans; several would all take what is free."""
    monkeypatch.setattr("rsq_stream.runtime.host_memory.available_bytes", lambda: 3000)
    assert [place.ram for place in places_for("cpu", 1)[0]] == [None]
    assert [place.ram for place in places_for("cpu", 4)[0]] == ["600"] * 4
    assert [place.ram for place in places_for(None, None)[0]] == ["800"] * 3


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have this machine see GPUs of the kinds in the list."""
    kinds = [OLD, OLD, NEW, OLD]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(sweep_places, "cuda_kinds", lambda: kinds)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return kinds


def test_a_place_a_gpu_of_one_kind(gpus: list[str]) -> None:
    places, left_out = places_for(None, None)
    assert [place.name for place in places] == ["cuda:0", "cuda:1", "cuda:3"]
    assert left_out == ("cuda:2",)
    # A process sees its own GPU alone, by whatever number, as its first.
    assert {place.device for place in places} == {"cuda"}
    seen = [place.environment["CUDA_VISIBLE_DEVICES"] for place in places]
    assert seen == ["0", "1", "3"]
    assert len(places_for("cuda", 2)[0]) == 2
    [only], left_out = places_for("cuda:2", None)
    assert (only.environment["CUDA_VISIBLE_DEVICES"], left_out) == ("2", ())
    assert places_for("cpu", None)[0][0].device == "cpu"


def test_gpus_that_were_chosen_before_keep_their_names(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus[:] = [NEW, NEW]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-ab12")
    places, _ = places_for(None, None)
    seen = [place.environment["CUDA_VISIBLE_DEVICES"] for place in places]
    assert seen == ["5", "GPU-ab12"]


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        ("cpu", 0, "--processes must be 1 to 256, not 0"),
        ("cuda", 4, "--processes must be 1 to 3, one a GPU, not 4"),
        ("cuda:2", 2, "--processes must be 1 to 1, one a GPU, not 2"),
        ("cuda:9", None, "--device must be one of cpu, cuda, cuda:0, cuda:1, cuda:2,"),
    ],
)
def test_places_that_are_not_there(
    gpus: list[str], device: str, processes: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        places_for(device, processes)


def test_a_folder_is_new_or_a_sweeps(tmp_path: Path) -> None:
    folder = tmp_path / "s.sweep"
    assert SweepFolder(folder).is_new
    assert not folder.exists()
    with SweepFolder(folder) as own:
        own.begin("ab", {"a": 1})
        with pytest.raises(ScratchError, match="another sweep is working here"):
            SweepFolder(folder).__enter__()
    again = SweepFolder(folder)
    assert (again.is_new, again.state("ab"), again.state("cd")) == (
        False,
        "unfinished",
        "new",
    )
    again.result_path("cd").write_text(json.dumps(result(7) | {"output": None}))
    assert again.state("cd") == "finished"
    (folder / "notes").touch()
    with pytest.raises(UsageError, match="must be new or a sweep's, it holds notes"):
        SweepFolder(folder)
    with pytest.raises(UsageError, match="is a file"):
        SweepFolder(folder / "notes")


@pytest.mark.parametrize("content", ["", "[]", '{"perplexity": 3}', '{"perplexity": 0'])
def test_a_damaged_result_is_named(tmp_path: Path, content: str) -> None:
    with SweepFolder(tmp_path / "s") as folder:
        path = folder.result_path("ab")
        path.write_text(content)
        with pytest.raises(ScratchError, match=r"ab\.json: is not what was written"):
            folder.result("ab")


def test_only_models_that_are_to_be_kept_stay(tmp_path: Path) -> None:
    with SweepFolder(tmp_path / "s") as folder:
        for key in ("kept", "gone", "open"):
            folder.begin(key, {})
        for key, output in (("kept", "somewhere"), ("gone", None)):
            content = json.dumps(result(7) | {"output": output})
            folder.result_path(key).write_text(content)
        folder.clean()
        found = {
            key: folder.run_folder(key).is_dir() for key in ("kept", "gone", "open")
        }
    assert found == {"kept": True, "gone": False, "open": True}


def test_a_model_is_known_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_checkpoint(tmp_path / "toy", blocks=1, shards=1)
    (model / "tokenizer.json").write_text("{}")
    folder = SweepFolder(tmp_path / "s")
    with folder:
        first = folder.model_sha256(open_toy(model), keep=True)
    shard = model / "model.safetensors"
    os.utime(shard)  # as a copy would: read once more, found the same
    assert folder.model_sha256(open_toy(model), keep=False) == first
    with folder:
        folder.model_sha256(open_toy(model), keep=True)
    hashed: list[Path] = []
    monkeypatch.setattr(atomic, "sha256_of", hashed.append)
    assert folder.model_sha256(open_toy(model), keep=False) == first
    assert hashed == []
    monkeypatch.undo()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    other = folder.model_sha256(open_toy(model), keep=False)
    (model / "tokenizer.json").write_text('{"another": 1}')
    third = folder.model_sha256(open_toy(model), keep=False)
    assert len({first, other, third}) == 3


CHILD = """
import os, pathlib, signal, sys, time
task = pathlib.Path(sys.argv[1])
do = task.read_text()
(task.parent / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
if do == "fail":
    print("Traceback: ...")
    print("error: the disk is full\\n")
    sys.exit(1)
if do == "mute":
    sys.exit(3)
if do == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if do == "wait":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    (task.parent / "ready").touch()
    time.sleep(30)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run children that do what their task says, in place of quantizing."""
    (tmp_path / "made_up_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sweep_pool, "_CHILD", "made_up_child")

    def begin(run: SweepRun, place: Place) -> Path:
        task: Path = tmp_path / run.key / "task.json"
        task.parent.mkdir()
        task.write_text(run.name)
        return task

    def call(what: list[str], places: list[Place], stop: threading.Event) -> Any:
        runs = [
            SweepRun(name=name, seed=0, job=QuantizeOptions(), key=str(number))
            for number, name in enumerate(what)
        ]
        return run_all(runs, places, begin, stop)

    return call


def test_every_place_gets_runs_and_a_failure_stops_no_other(
    pool: Any, tmp_path: Path
) -> None:
    places = [
        Place(name=f"cuda:{n}", device="cuda", environment={"CUDA_VISIBLE_DEVICES": n})
        for n in ("4", "7")
    ]
    wanted = ["good", "fail", "mute", "killed", "good"]
    ended = list(pool(wanted, places, threading.Event()))
    failures = {made.run.key: made.failure for made in ended}
    assert failures == {
        "0": None,
        "1": "the disk is full",
        "2": "its process ended with exit code 3",
        "3": "its process was ended by SIGKILL: was memory short?",
        "4": None,
    }
    gpus = {(tmp_path / key / "gpu").read_text() for key in failures}
    assert gpus == {"4", "7"}


def test_a_stop_asks_the_processes_and_begins_no_other(
    pool: Any, tmp_path: Path
) -> None:
    stop = threading.Event()

    def ask() -> None:
        while not (tmp_path / "0" / "ready").exists():
            stop.wait(0.01)
        stop.set()

    threading.Thread(target=ask).start()
    place = Place(name="cpu", device="cpu")
    assert list(pool(["wait", "good"], [place], stop)) == []
    assert not (tmp_path / "1").exists()


def test_a_run_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    # Its task is a pipe that nobody writes to, so it waits before its work begins.
    os.mkfifo(tmp_path / "task.json")
    command = [sys.executable, "-P", "-m", "rsq_stream.cli.sweep.worker"]
    with subprocess.Popen(
        [*command, str(tmp_path / "task.json")],
        stdin=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        assert child.stdin is not None
        child.stdin.close()  # as the end of this process would
        assert child.wait(60) == INTERRUPTED
