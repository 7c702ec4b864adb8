"""Whatever step on disk a run dies at, the resumed one gives the same bytes.

Every n-th step here; ``make test-faults`` tries all of them (some 20 minutes a kind).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import DIED

ROOT = Path(__file__).resolve().parent.parent
STRIDE = int(os.environ.get("RSQ_FAULT_STRIDE", "61"))
"""Of the steps of a run, every how many are tried."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A toy, its output in one go, and the number of steps that took."""
    folder = tmp_path_factory.mktemp("faults")
    return folder, int(_run(folder, "none")[-1])


@pytest.mark.parametrize("kind", ["kill", "power", "ENOSPC", "EIO"])
def test_a_run_that_failed_anywhere_ends_in_the_same_bytes(
    prepared: tuple[Path, int], kind: str
) -> None:
    folder, steps = prepared
    assert steps > 300  # stages, chunks, shards and small files are all among them
    offset = sum(map(ord, kind)) % STRIDE
    lines = _run(folder, kind, *range(offset, steps, STRIDE))
    found = [json.loads(line) for line in lines]
    assert len(found) == len(range(offset, steps, STRIDE))
    ends = {DIED} if kind in ("kill", "power") else {1}
    # A step after the last file has its name may fail without harm.
    assert {line["first"] for line in found} <= ends | {0}
    assert [line for line in found if line["second"] != 0] == []
    assert [line for line in found if not (line["same"] and line["clean"])] == []


def _run(folder: Path, *arguments: object) -> list[str]:
    command = [sys.executable, "-m", "tests.faults", str(folder), *map(str, arguments)]
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()
