"""Kill a run with SIGKILL at random times, start it again, for minutes; compare.

    python tests/soak.py [--minutes 10] [--model DIR --calibration FILE] [--folder DIR]

Every restart is the public command in a process of its own (forked from one that has
torch loaded, so that most of the time goes into the run). Each round starts over
with nothing and ends when a run is left to finish: its files must have the sha256 of
those of an uninterrupted run. Prints counts at the end; exit 1 if anything differed.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rsq_stream.demo import CALIBRATION, MODEL

FINISHED, REFUSED = 0, 1


@dataclass
class Counts:
    """What a soak did."""

    kills: int = 0
    resumes: int = 0
    finished: int = 0
    identical: int = 0
    refused: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.resumes} resumes, {self.finished} finished"
            f" outputs, {self.identical} identical, {self.refused} refused"
        )


def start(arguments: list[str]) -> int:
    """Fork a process that runs the command; gives its number."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            from rsq_stream.cli.main import main

            main(arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        finally:
            os._exit(code)
    return child


def wait(child: int, until: float | None) -> int | None:
    """Wait for a child until a time; gives its exit code, None if it still runs."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG if until is not None else 0)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() >= until:
            return None
        time.sleep(0.002)


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def soak(
    command: list[str], folder: Path, minutes: float, chooser: random.Random
) -> Counts:
    """Kill and restart until the time is over; the last round is left to finish.

    On a machine so busy that no kill came in that time, until there was one.
    """
    counts, whole = Counts(), folder / "whole"
    began = time.monotonic()
    if wait(start([*command, "--output", str(whole)]), None) != FINISHED:
        raise SystemExit("the uninterrupted run did not finish")
    seconds = time.monotonic() - began
    wanted, ends = hashes(whole), time.monotonic() + 60 * minutes
    while time.monotonic() < ends or not counts.kills:
        output = folder / "out"
        call, again = [*command, "--output", str(output)], False
        while True:
            counts.resumes += again
            again = True
            # Up to a whole run's time: some are left to finish, most are not.
            child = start(call)
            code = wait(child, time.monotonic() + chooser.uniform(0, seconds))
            if code is None:
                os.kill(child, signal.SIGKILL)
                code = wait(child, None)
            if code == -signal.SIGKILL:
                counts.kills += 1
                continue
            break
        if code == REFUSED and (output / "rsq_stream.sha256").exists():
            pass  # killed after the journal went: there was nothing left to do
        elif code != FINISHED:
            counts.refused += 1
        counts.finished += 1
        counts.identical += hashes(output) == wanted
        shutil.rmtree(output)
        shutil.rmtree(folder / "out.work", ignore_errors=True)
    return counts


def main() -> None:
    """Run the soak and print its counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where it works: a disk, best")
    options = parser.parse_args()
    # Loaded once, before the first fork. No thread may live across it.
    import rsq_stream.pipeline.quantize
    import rsq_stream.planning.execution_plan  # noqa: F401

    command = ["quantize", str(options.model), "--bits", "3", "--group-size", "-1"]
    command += ["--calibration", str(options.calibration), "--quiet", "--device", "cpu"]
    command += ["--samples", str(options.samples), "--seed", str(options.seed)]
    command += ["--sequence-length", str(options.sequence_length), "--expand", "2"]
    with tempfile.TemporaryDirectory(prefix="rsq-soak-", dir=options.folder) as made:
        counts = soak(command, Path(made), options.minutes, random.Random(options.seed))
    sys.stdout.write(f"{counts}\n")
    if counts.refused or counts.identical != counts.finished or not counts.kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
