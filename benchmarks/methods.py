"""Perplexity of each method on a model: mean and deviation over seeds, as a table.

    python benchmarks/methods.py [--model DIR --calibration FILE --text FILE]

Without options it takes the bundled demo model. A seed decides the calibration
windows and the signs of the rotation. Every row is one run of the public command,
so a figure in the README can be had again by running this.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rsq_stream.demo import CALIBRATION, HELD_OUT, MODEL

SETTINGS = ((3, -1), (2, 64))
METHODS = ("rtn", "gptq", "quarot", "rsq")


def run(*arguments: object) -> dict:
    """Run rsq-stream and give what it prints as JSON."""
    program = Path(sys.executable).with_name("rsq-stream")
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def perplexity(model: Path, options: argparse.Namespace) -> float:
    """Measure a folder on the held-out text."""
    length = options.sequence_length
    arguments = ("--text", options.text, "--sequence-length", length, "--json")
    if options.bos:
        arguments += ("--bos",)
    return run("eval", model, *arguments)["perplexity"]


def main() -> None:
    """Quantize and measure everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bos", action="store_true")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {platform.machine()},"
        f" {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores;"
        f" {options.samples} x {options.sequence_length} calibration tokens,"
        f" {options.seeds} seeds"
    )
    print(f"full precision: {perplexity(options.model, options):.3f}\n")
    print("| bits | group | method | perplexity | deviation | seconds |")
    print("|---|---|---|---|---|---|")
    for bits, group in SETTINGS:
        for method in METHODS:
            measured, seconds = [], []
            seeds = range(1 if method == "rtn" else options.seeds)
            for seed in seeds:
                with tempfile.TemporaryDirectory() as folder:
                    output = Path(folder) / "model"
                    made = run(
                        *("quantize", options.model, "--bits", bits),
                        *("--group-size", group, "--method", method, "--seed", seed),
                        *("--calibration", options.calibration, "--output", output),
                        *("--samples", options.samples, "--json"),
                        *("--sequence-length", options.sequence_length),
                    )
                    seconds.append(made["seconds"])
                    measured.append(perplexity(output, options))
            spread = statistics.stdev(measured) if len(measured) > 1 else 0.0
            print(
                f"| {bits} | {group} | {method} | {statistics.mean(measured):.3f}"
                f" | {spread:.3f} | {statistics.median(seconds):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
