"""Running commands in tests: in this process, or what to launch in another."""

from collections.abc import Callable

from rsq_stream.demo import CALIBRATION

LAUNCH = "from rsq_stream.cli.main import main; main()"
SMALL = (
    *("--calibration", str(CALIBRATION), "--device", "cpu"),
    *("--samples", "8", "--sequence-length", "64"),
)

Run = Callable[..., tuple[int, str, str]]
"""Runs a command; gives exit code, stdout and stderr."""
