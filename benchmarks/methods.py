"""Perplexity of each method or solver option: mean and deviation over seeds.

    python benchmarks/methods.py [--table NAME, see TABLES]
                                 [--settings 3:-1 2:64 2:64:16:8]
                                 [--model DIR --calibration FILE --text FILE]

A setting is bits:group[:samples[:rolled copies]], a group of -1 one scale a row.
Without options it takes the bundled demo model. A seed decides the calibration
windows and the signs of the rotation. Every figure is what the public commands
``quantize`` and ``eval`` give with the options named; they run in this program, several
at a time, each on one thread, as neither decides a byte.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import rsq_stream
from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.demo import CALIBRATION, HELD_OUT, MODEL

_PLAIN = {"propagate": 0.0, "sweeps": 0, "refit": False, "shrinkage": 0.0}
_ALL = {"shrinkage": 0.0}
_W4A4KV4 = {"activation_bits": 4, "kv_bits": 4}
_CLIPPED = {**_W4A4KV4, "activation_clip": 0.9, "kv_clip": 0.95}
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "methods": {name: {"method": name} for name in ("rtn", "gptq", "quarot", "rsq")},
    "defaults": {"plain": {**_PLAIN}, "default": {}},
    "bpw": {
        "2 bits": {"bits": 2},
        "--bpw 7.87": {"bits": None, "bpw": 7.87},
        "3 bits": {"bits": 3},
        "--bpw 8.69": {"bits": None, "bpw": 8.69},
        "4 bits": {"bits": 4},
    },
    "rotation": {name: {"rotation": name} for name in ("none", "portable", "full")},
    "w4a4kv4": {
        f"{label}{suffix}": {**row, "eval": scheme}
        for suffix, scheme in (("", _W4A4KV4), (", clip 0.9/0.95", _CLIPPED))
        for label, row in (
            *((name, {"method": name}) for name in ("gptq", "quarot", "rsq")),
            ("rsq calibrated as served", scheme),
        )
    },
    "grids": {
        "integers": {},
        "integers, asymmetric": {"symmetric": False},
        "nf": {"grid": "nf"},
        "e8p": {"grid": "e8p"},
        "e8p, no sweeps": {"grid": "e8p", "sweeps": 0},
        "e8p, no refit": {"grid": "e8p", "refit": False},
        "e8p, neither": {"grid": "e8p", "sweeps": 0, "refit": False},
        "e8p, 6 sweeps": {"grid": "e8p", "sweeps": 6},
    },
    "importance": {
        **{
            name: {"importance": name}
            for name, strategy in STRATEGIES.items()
            if not strategy.takes_chunks
        },
        "chunks 1/4": {"importance": "chunks", "importance_chunks": "1/4"},
        "attncon, skip 4": {"importance_skip": 4},
        "attncon, log": {"importance_transform": "log"},
        "attncon, rank": {"importance_transform": "rank"},
        "attncon, quantile 0.02": {"importance_quantile": 0.02},
        "attncon, by visible queries": {"importance_visible": "linear"},
        "attncon, squared": {"importance_power": 2},
    },
    "solver": {
        "rsq, one stream": {**_PLAIN},
        "+ refit": {**_PLAIN, "refit": True},
        "+ 2 sweeps": {**_PLAIN, "sweeps": 2},
        "+ refit, 2 sweeps": {**_PLAIN, "refit": True, "sweeps": 2},
        "+ act-order": {**_PLAIN, "act_order": True},
        "two streams": {**_PLAIN, "propagate": 0.5},
        "two streams + refit": {**_PLAIN, "propagate": 0.5, "refit": True},
        "two streams + 2 sweeps": {**_PLAIN, "propagate": 0.5, "sweeps": 2},
        "all three": {**_ALL},
        "all, propagate 0.35": {**_ALL, "propagate": 0.35},
        "all, propagate 0.7": {**_ALL, "propagate": 0.7},
        "all, propagate 1": {**_ALL, "propagate": 1.0},
        "all, 4 sweeps": {**_ALL, "sweeps": 4},
        "all, act-order": {**_ALL, "act_order": True},
        "all, clip exponent 2.4": {**_ALL, "clip_exponent": 2.4},
        "all, uniform tokens": {**_ALL, "importance": "uniform"},
        "all, no residual correction": {**_ALL, "residual_correction": False},
        "all, down_proj 0.25": {**_ALL, "propagate_override": ["down_proj=0.25"]},
        "all, o_proj 0.75": {**_ALL, "propagate_override": ["o_proj=0.75"]},
        "all, first half 0.75": {**_ALL, "propagate_override": ["*@0-1=0.75"]},
        "all, last half 0.75": {**_ALL, "propagate_override": ["*@2-3=0.75"]},
        "all, shrinkage 1 (default)": {},
    },
}
"""Rows of a table: options of ``quantize`` by label, and under ``eval`` those of it."""
_USUAL = {"bits": 3, "group_size": -1, "samples": 64, "expand": 1}


def perplexity(
    folder: Path, options: argparse.Namespace, given: dict[str, Any]
) -> float:
    """Measure a folder on the held-out text, as ``eval`` does with options given."""
    evaluated = rsq_stream.evaluate(
        folder,
        options.text,
        sequence_length=options.sequence_length,
        max_windows=options.max_windows,
        bos=options.bos,
        activations=given,
        device="cpu",
        threads=1,
    )
    return evaluated.evaluation.perplexity


def measured(
    task: tuple[argparse.Namespace, dict[str, Any]],
) -> tuple[float, float, float]:
    """Quantize and measure once; gives perplexity, seconds, bits per weight."""
    from rsq_stream.cli.options.quantize_options import QuantizeOptions
    from rsq_stream.cli.options.resolve import prepare

    from rsq_stream.pipeline.quantize import quantize

    options, row = task
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = QuantizeOptions(
            calibration=str(options.calibration),
            sequence_length=options.sequence_length,
            output=Path(folder) / "model",
            device="cpu",
            threads=1,
            **{name: value for name, value in row.items() if name != "eval"},
        )
        made = prepare(str(options.model), job, read_calibration=True)
        began = time.monotonic()
        if job.bpw is not None:
            made, _ = rsq_stream.choose_bits(made, job.bpw)
        summary = quantize(made)
        seconds = time.monotonic() - began
        bits = made.execution.bits_per_weight
        given = row.get("eval", {})
        return perplexity(summary.output, options, given), seconds, bits


def main() -> None:
    """Quantize and measure everything, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", choices=TABLES, default="methods")
    parser.add_argument("--settings", nargs="+", default=["3:-1", "2:64"])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="only those with this in their name")
    parser.add_argument("--bos", action="store_true")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    tasks, labels = [], []
    for setting in options.settings:
        given = [int(part) for part in setting.split(":")]
        wanted = {**_USUAL, **dict(zip(_USUAL, given, strict=False))}
        for label, chosen in TABLES[options.table].items():
            if options.rows not in label:
                continue
            seeds = 1 if chosen.get("method") == "rtn" else options.seeds
            labels.append((wanted, label, seeds))
            row = wanted | chosen
            tasks += [(options, row | {"seed": seed}) for seed in range(seeds)]
    sys.stdout.write(
        f"torch {torch.__version__}, {platform.machine()},"
        f" {torch.backends.cpu.get_cpu_capability()}, {options.processes} processes of"
        f" one thread; windows of {options.sequence_length} tokens,"
        f" {options.seeds} seeds\n"
        f"full precision: {perplexity(options.model, options, {}):.3f}\n\n"
        "| bits | group | windows | method | perplexity | deviation | bits/weight"
        " | seconds |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes) as pool:
        found = pool.imap(measured, tasks)
        for wanted, label, seeds in labels:
            results = [next(found) for _ in range(seeds)]
            values = [result[0] for result in results]
            spread = statistics.stdev(values) if seeds > 1 else 0.0
            seconds = statistics.median(result[1] for result in results)
            bits, group_size, samples, copies = wanted.values()
            group = "row" if group_size == -1 else group_size
            windows = f"{samples} x {copies}" if copies > 1 else samples
            mean = statistics.mean(values)
            sys.stdout.write(
                f"| {bits} | {group} | {windows} | {label} | {mean:.3f}"
                f" | {spread:.3f} | {results[0][2]:.3f} | {seconds:.1f} |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
