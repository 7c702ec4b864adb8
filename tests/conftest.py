"""What every test may use, and what the report says about the machine."""

import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from rsq_stream.cli.main import main

from rsq_stream.demo import MODEL
from tests.support.cli_runs import Run
from tests.support.crashes import Crash
from tests.support.faults import RUN, TOY, Recording
from tests.support.toy import contents, quick_folder, run_toy, toy_checkpoint

# Small products lose more to OpenMP's barriers than they gain; what threads may
# change is tested through the pool.
torch.set_num_threads(1)

# Where there is room, temporary folders lie in memory: a run syncs at every step.
if quick_folder() is not None:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(quick_folder()))

LONGEST = ("test_faults.py", "test_failing_steps.py", "test_memory_stays_flat.py")
ROOT = Path(__file__).resolve().parent.parent
REPORTED = ("torch", "numpy", "numba", "transformers", "zarr")


def pytest_report_header() -> list[str]:
    versions = ", ".join(f"{name} {_version(name)}" for name in REPORTED)
    isa, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return [f"versions: {versions}", f"CPU: {isa}, {threads} threads; CUDA: {_cuda()}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first: of two processes none is then left with one at the end.
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(
        reason=f"needs a CUDA device, and torch {torch.__version__} sees none"
    )
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Public models and texts that lie beside some checkouts, never inside."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared beside the checkout, which is absent")
    return folder


@pytest.fixture(scope="module")
def disk_folder() -> Iterator[Path]:
    """A folder on a disk, for what memory would not show."""
    with tempfile.TemporaryDirectory(prefix="rsq-stream-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: a sync costs nothing there."""
    folder = quick_folder() or tmp_path_factory.mktemp("faults")
    with tempfile.TemporaryDirectory(prefix="rsq-stream-", dir=folder) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def crash(place: Path) -> Crash:
    toy = toy_checkpoint(place / "toy", **TOY)
    run_toy(toy, place / "whole", **RUN)
    recording = Recording(toy, place / "out")
    assert len(recording.moments) > 400  # stages, chunks, shards, small files
    return Crash(toy, recording, contents(place / "whole"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return code if isinstance(code, int) else 0, out, err

    return call


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished output, by rounding."""
    output = tmp_path_factory.mktemp("quantized") / "out"
    with pytest.raises(SystemExit):
        main(["quantize", str(MODEL), "--method", "rtn", "--output", str(output)])
    assert (output / "rsq_stream.json").is_file()
    return output


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), {torch.version.cuda}"
