"""Running commands in tests: in this process, or in another."""

import subprocess
import sys
from collections.abc import Callable

from rsq_stream.demo import CALIBRATION

LAUNCH = "from rsq_stream.cli.main import main; main()"
SMALL = (
    *("--calibration", str(CALIBRATION), "--device", "cpu"),
    *("--samples", "8", "--sequence-length", "64"),
)

Run = Callable[..., tuple[int, str, str]]
"""Runs a command; gives exit code, stdout and stderr."""


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process of its own, as an installed tool would run."""
    return subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
