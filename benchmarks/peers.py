"""Perplexity and time of other quantizers and of this one, as a table.

    python benchmarks/peers.py [--bits 2 3] [--rows GPTQModel] [--repeat 3]
        [-- --asymmetric ...]

All have the same model, calibration windows and evaluation windows, on the CPU.
Each peer runs in a virtual environment of its own, made at the first run (about a
gigabyte each); what follows ``--`` goes to ``rsq-stream quantize``.

Only the linears of the blocks are quantized; the peers compute in fp32, and their
results are measured in their own process, by the same loop (``peer_workers.py``).
Quantization seconds go from the loaded model to the quantized one in memory, or, in
the next column, in a saved folder; rsq-stream writes as it goes, from the opened model
to the whole folder, and is measured when its loops are compiled. Process seconds are
all of the process, imports and loading too, but not the evaluation. Of repeated runs
each figure is the median.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TORCH = "torch==2.13.0"
OURS = "rsq-stream"
PROGRAM = Path(sys.executable).with_name(OURS)
MSE = {
    "observer": "memoryless_mse",
    # The same 80 candidates by the same error, all of them tried.
    "observer_kwargs": {"maxshrink": 0.8, "norm": 2.0, "patience": 80},
}
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llm-compressor, GPTQ as is", "llm-compressor", {}),
    ("llm-compressor, GPTQ, MSE scales", "llm-compressor", MSE),
    (
        "llm-compressor, GPTQ, rotation, MSE scales, asymmetric",
        "llm-compressor",
        {"rotations": ["R1", "R2"], "symmetric": False, **MSE},
    ),
    ("GPTQModel, GPTQ as is", "gptqmodel", {}),
    (
        "GPTQModel, GPTQ, MSE scales, asymmetric",
        "gptqmodel",
        {"mse": 2.4, "sym": False},
    ),
    ("auto-round, 200 iterations, asymmetric", "auto-round", {"sym": False}),
    (OURS, OURS, {}),
    (f"{OURS} --method gptq", OURS, {"method": "gptq"}),
)
PINS = {
    "llm-compressor": "llmcompressor==0.14.0.1",
    "gptqmodel": "gptqmodel==7.6.0",
    "auto-round": "auto-round==0.16.1",
}
FIGURES = {"perplexity": ".3f", "quantize": ".1f", "saved": ".1f", "process": ".1f"}
WORKER = Path(__file__).resolve().with_name("peer_workers.py")
ENVIRONMENT = {
    "BUILD_CUDA_EXT": "0",  # of GPTQModel's installation
    "CUDA_VISIBLE_DEVICES": "",
    "GPTQMODEL_CPU_WORKERS": "2",  # it needs two, and makes one where cores are few
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",  # this folder's run.py must not hide another's module
    "TOKENIZERS_PARALLELISM": "false",
}
Job = dict[str, Any]


def run(command: Sequence[object], folder: Path | None = None) -> tuple[str, float]:
    """Run a command, in a folder, and give what it prints and its seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | ENVIRONMENT,
        cwd=folder,  # some peers leave logs where they run
        check=False,
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise RuntimeError(lines[-1])
    return done.stdout, time.perf_counter() - began


def environment(peer: str, folder: Path) -> Path:
    """Return a peer's python; its environment is made unless it stands."""
    place = folder.resolve() / peer
    python, stamp = place / "bin" / "python", place / "installed.txt"
    wanted = f"{TORCH} {PINS[peer]}"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {wanted} in {place}", file=sys.stderr, flush=True)
        _, seconds = run([sys.executable, "-m", "venv", place])
        for second in ("numpy", PINS[peer]):
            command = [python, "-m", "pip", "install", TORCH, second]
            seconds += run(command)[1]
        stamp.write_text(wanted)
        print(f"installed in {seconds:.0f} s", file=sys.stderr, flush=True)
    return python


def measure_peer(
    peer: str, settings: Job, *, bits: int, options: Any, scratch: Path
) -> Job:
    """Quantize and measure in a process of the peer's environment."""
    python = environment(peer, options.environments)
    job = {"peer": peer, "settings": settings, "bits": bits, "folder": str(scratch)}
    job |= {"model": str(options.model.resolve()), "group_size": options.group_size}
    found, seconds = work(python, job, scratch)
    if "save" in found:
        found["saved"] = found["quantize"] + found["save"]
    return found | {"process": seconds - found["evaluate"]}


def work(python: str | Path, job: Job, scratch: Path) -> tuple[Job, float]:
    """Have a job done, and give its figures and the seconds of the process."""
    _, seconds = run([python, WORKER, json.dumps(job)], scratch)
    found: Job = json.loads((scratch / "result.json").read_text())
    return found, seconds


def measure_ours(settings: Job, bits: int, options: Any, scratch: Path) -> Job:
    """Quantize and measure by the installed command."""
    given = [part for key, value in settings.items() for part in (f"--{key}", value)]
    for name in ("warm-up", "timed"):  # the first compiles, and does not count
        output = scratch / f"{name}-{bits}"
        samples = 1 if name == "warm-up" else options.samples
        command = [
            *(PROGRAM, "quantize", options.model, "--bits", bits, "--json"),
            *("--group-size", options.group_size, "--seed", options.seed),
            *("--calibration", options.calibration, "--samples", samples),
            *("--sequence-length", options.sequence_length, "--device", "cpu"),
            *("--output", output, *given, *options.extra),
        ]
        printed, seconds = run(command)
    taken = json.loads(printed)["seconds"]
    found = {"quantize": taken, "saved": taken, "process": seconds}
    found["perplexity"] = evaluate(output, options)
    for name in ("warm-up", "timed"):
        shutil.rmtree(scratch / f"{name}-{bits}")
    return found


def evaluate(model: Path, options: Any) -> float:
    """Measure a folder by the installed command."""
    some = () if options.max_windows is None else ("--max-windows", options.max_windows)
    length = ("--sequence-length", options.sequence_length)
    command = (PROGRAM, "eval", model, "--text", options.text, *length, *some)
    printed, _ = run((*command, "--device", "cpu", "--json"))
    return json.loads(printed)["perplexity"]


def save_windows(options: Any, path: Path) -> None:
    """Save the windows: calibration's as rsq-stream takes them, and evaluation's."""
    from safetensors.torch import save_file

    from rsq_stream.calibration.text import read_text
    from rsq_stream.calibration.tokenizer import load_tokenizer
    from rsq_stream.calibration.windows import choose_windows
    from rsq_stream.evaluation.perplexity import evaluation_windows

    tokenizer = load_tokenizer(options.model)
    name, seed = str(options.calibration), options.seed
    text, length = read_text(name, seed), options.sequence_length
    chosen = choose_windows(
        text,
        tokenizer,
        samples=options.samples,
        sequence_length=length,
        seed=seed,
        where=name,
    )
    text = read_text(str(options.text), seed, "--text")
    how = {"bos": False, "max_windows": options.max_windows, "where": "--text"}
    measured = evaluation_windows(text, tokenizer, length, **how)
    windows = {"calibration": chosen, "evaluation": measured.contiguous()}
    save_file(windows, path)


def parse() -> argparse.Namespace:
    """Read the command line; without options, all is the demo's."""
    from rsq_stream.demo import CALIBRATION, HELD_OUT, MODEL

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cache = Path.home() / ".cache" / "rsq-stream" / "peers"
    parser.add_argument("--environments", type=Path, default=cache, metavar="DIR")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the windows")
    parser.add_argument("--max-windows", type=int, help="to evaluate on; all if none")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each row")
    parser.add_argument("--rows", default="", help="only those with this in their name")
    parser.add_argument("extra", nargs="*", help="after --, for rsq-stream quantize")
    return parser.parse_args()


def line(row: tuple[str, str, Job], bits: int, options: Any, scratch: Path) -> str:
    """Return a row's line of the table, or what went wrong."""
    label, peer, settings = row
    runs: list[Job] = []
    try:
        for _ in range(options.repeat):
            if peer == OURS:
                runs.append(measure_ours(settings, bits, options, scratch))
            else:
                job = measure_peer(
                    peer, settings, bits=bits, options=options, scratch=scratch
                )
                runs.append(job)
    except RuntimeError as error:
        return f"| {label} | {bits} | failed: {error} | | | |"
    figures = [
        f"{statistics.median(values):{form}}" if all(values) else ""
        for key, form in FIGURES.items()
        for values in [[made.get(key, 0.0) for made in runs]]
    ]
    return f"| {label} | {bits} | {' | '.join(figures)} |"


def main() -> None:
    """Measure every row and print the table."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        save_windows(options, scratch / "windows")
        pins = (f"{OURS} {version(OURS)}", TORCH, *PINS.values())
        print(f"{platform.platform()}, {os.cpu_count()} cores", *pins, sep=", ")
        job = {"peer": "plain", "folder": folder, "model": str(options.model.resolve())}
        loop = work(sys.executable, job, scratch)[0]["perplexity"]
        own = evaluate(options.model, options)
        print(f"full precision: {own:.4f}, by the loop of the peers: {loop:.4f}\n")
        print("| method | bits | perplexity | quantization s | saved s | process s |")
        print("|---|---|---|---|---|---|", flush=True)
        for bits in options.bits:
            for row in ROWS:
                if options.rows.lower() in row[0].lower():
                    print(line(row, bits, options, scratch), flush=True)


if __name__ == "__main__":
    main()
