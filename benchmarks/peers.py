"""Perplexity and time of other quantizers and of this one, as a table.

    python benchmarks/peers.py [--bits 2 3] [--rows GPTQModel] [-- --asymmetric ...]

All have the same model, calibration windows and evaluation windows, on the CPU.
Each peer runs in a virtual environment of its own, made at the first run (about a
gigabyte each); what follows ``--`` goes to ``rsq-stream quantize``.

Only the linears of the blocks are quantized; the peers compute in fp32, and their
results are measured in their own process, by the same loop. Quantization seconds
go from the loaded model to the quantized one in memory; of rsq-stream, from the
opened model to the written one. Process seconds are all of the process, imports
and loading too, but not the evaluation.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

TORCH = "torch==2.13.0"
OURS = "rsq-stream"
PROGRAM = Path(sys.executable).with_name(OURS)
MSE = {"observer": "memoryless_mse", "observer_kwargs": {"maxshrink": 0.8}}
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llm-compressor, GPTQ as is", "llm-compressor", {}),
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
)
ENVIRONMENT = {
    "BUILD_CUDA_EXT": "0",  # of GPTQModel's installation
    "CUDA_VISIBLE_DEVICES": "",
    "GPTQMODEL_CPU_WORKERS": "2",  # it needs two, and makes one where cores are few
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",  # this folder's run.py must not hide another's module
    "TOKENIZERS_PARALLELISM": "false",
}

# Workers: each runs in its peer's environment, so it imports inside. ``lap`` notes
# the seconds of the stage that has ended.

Job = dict[str, Any]
Lap = Callable[[str], None]


def plain_model(folder: str) -> Any:
    """Load a model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def llm_compressor(job: Job, window_BT: Any, lap: Lap) -> Any:
    """Quantize by GPTQModifier, after SpinQuantModifier where rotations are given."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from torch.utils.data import DataLoader

    model = plain_model(job["model"])
    lap("load")
    settings = dict(job["settings"])
    rotations = settings.pop("rotations", None)
    size = {"num_bits": job["bits"], "group_size": job["group_size"]}
    weights = QuantizationArgs(strategy="group", **size, **settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = [GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])]
    if rotations:  # R1 and R2 are folded into the weights: nothing stays online
        recipe.insert(0, SpinQuantModifier(rotations=rotations))
    rows = [{"input_ids": row_T, "attention_mask": row_T**0} for row_T in window_BT]
    text = {"num_calibration_samples": len(rows), "max_seq_length": window_BT.shape[1]}
    oneshot(model=model, recipe=recipe, dataset=DataLoader(rows), **text)
    lap("quantize")
    return model


def gptqmodel(job: Job, window_BT: Any, lap: Lap) -> Any:
    """Quantize by GPTQModel; its packed linears become plain ones again."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    size = {"bits": job["bits"], "group_size": job["group_size"]}
    # v2 has the zero points as they are, v1 less one: the packed linears read v2.
    stay = {"format": "gptq_v2", "offload_to_disk": False}
    config = QuantizeConfig(**size, **stay, **job["settings"])
    model = GPTQModel.load(job["model"], config, dtype=torch.float32, device="cpu")
    lap("load")
    model.quantize([{"input_ids": row_T.tolist()} for row_T in window_BT])
    lap("quantize")
    for name, packed in list(model.model.named_modules()):
        if hasattr(packed, "dequantize_weight"):
            weight_OI = packed.eval().dequantize_weight().T.float().clone()
            linear = torch.nn.Linear(*weight_OI.shape[::-1], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
            model.model.set_submodule(name, linear)
    return model.model


def auto_round(job: Job, window_BT: Any, lap: Lap) -> Any:
    """Tune the rounding by signed gradients; the weights end up on the grid."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model = plain_model(job["model"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lap("load")
    size = {"bits": job["bits"], "group_size": job["group_size"]}
    text = {"nsamples": len(window_BT), "seqlen": window_BT.shape[1]}
    how = {"iters": 200, "device_map": "cpu", "amp": False, **job["settings"]}
    batches = list(window_BT.split(8))
    tuner = AutoRound(model, tokenizer, dataset=batches, **size, **text, **how)
    model, _ = tuner.quantize()
    lap("quantize")
    return model


PEERS = {
    "llm-compressor": ("llmcompressor==0.14.0.1", llm_compressor),
    "gptqmodel": ("gptqmodel==7.6.0", gptqmodel),
    "auto-round": ("auto-round==0.16.1", auto_round),
}


def work(job: Job) -> None:
    """Quantize in this process, measure, leave the figures in a file."""
    from safetensors.torch import load_file

    seconds, last = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = now - last, now

    windows = load_file(f"{job['folder']}/windows")
    model = PEERS[job["peer"]][1](job, windows["calibration"], lap)
    lap("convert")
    perplexity = loop_perplexity(model.eval(), windows["evaluation"])
    lap("evaluate")
    result = Path(job["folder"]) / "result.json"
    result.write_text(json.dumps({"perplexity": perplexity} | seconds))


def loop_perplexity(model: Any, window_BT: Any) -> float:
    """Give exp of the mean fp32 loss of tokens 2 .. T of each window."""
    import torch

    loss = 0.0
    with torch.inference_mode():
        for part_BT in window_BT.split(4):
            logits = model(input_ids=part_BT, use_cache=False).logits[:, :-1].float()
            loss += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part_BT[:, 1:].flatten(), reduction="sum"
            ).item()
    return math.exp(loss / window_BT[:, 1:].numel())


# The driver: runs in the environment of rsq-stream.


def run(*command: object, folder: Path | None = None) -> tuple[str, float]:
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
    """Give a peer's python; its environment is made unless it stands."""
    place = folder.resolve() / peer
    python, stamp = place / "bin" / "python", place / "installed.txt"
    wanted = f"{TORCH} {PEERS[peer][0]}"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {wanted} in {place}", file=sys.stderr, flush=True)
        _, seconds = run(sys.executable, "-m", "venv", place)
        for second in ("numpy", PEERS[peer][0]):
            seconds += run(python, "-m", "pip", "install", TORCH, second)[1]
        stamp.write_text(wanted)
        print(f"installed in {seconds:.0f} s", file=sys.stderr, flush=True)
    return python


def measure_peer(
    peer: str, settings: Job, bits: int, options: Any, scratch: Path
) -> Job:
    """Quantize and measure in a process of the peer's environment."""
    python = environment(peer, options.environments)
    job = {"peer": peer, "settings": settings, "bits": bits, "folder": str(scratch)}
    job |= {"model": str(options.model.resolve()), "group_size": options.group_size}
    command = (python, Path(__file__).resolve(), "--worker", json.dumps(job))
    _, seconds = run(*command, folder=scratch)
    found = json.loads((scratch / "result.json").read_text())
    return found | {"process": seconds - found["evaluate"]}


def measure_ours(bits: int, options: Any, scratch: Path) -> Job:
    """Quantize and measure by the installed command."""
    for name in ("warm-up", "timed"):  # the first compiles, and does not count
        output = scratch / f"{name}-{bits}"
        samples = 1 if name == "warm-up" else options.samples
        printed, seconds = run(
            *(PROGRAM, "quantize", options.model, "--bits", bits, "--json"),
            *("--group-size", options.group_size, "--seed", options.seed),
            *("--calibration", options.calibration, "--samples", samples),
            *("--sequence-length", options.sequence_length, "--device", "cpu"),
            *("--output", output, *options.extra),
        )
    found = {"quantize": json.loads(printed)["seconds"], "process": seconds}
    return found | {"perplexity": evaluate(output, options)}


def evaluate(model: Path, options: Any) -> float:
    """Measure a folder by the installed command."""
    some = () if options.max_windows is None else ("--max-windows", options.max_windows)
    length = ("--sequence-length", options.sequence_length)
    command = (PROGRAM, "eval", model, "--text", options.text, *length, *some)
    return json.loads(run(*command, "--device", "cpu", "--json")[0])["perplexity"]


def save_windows(options: Any, path: Path) -> Job:
    """Save the windows: calibration's as rsq-stream takes them, and evaluation's."""
    from safetensors.torch import save_file

    from rsq_stream.calibration import choose_windows, load_tokenizer, read_text
    from rsq_stream.evaluation.perplexity import evaluation_windows

    tokenizer = load_tokenizer(options.model)
    name, seed = str(options.calibration), options.seed
    text, length = read_text(name, seed), options.sequence_length
    chosen = choose_windows(text, tokenizer, options.samples, length, seed, name)
    text = read_text(str(options.text), seed, "--text")
    how = {"bos": False, "max_windows": options.max_windows, "where": "--text"}
    measured = evaluation_windows(text, tokenizer, length, **how)
    windows = {"calibration": chosen, "evaluation": measured.contiguous()}
    save_file(windows, path)
    return windows


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
    parser.add_argument("--rows", default="", help="only those with this in their name")
    parser.add_argument("extra", nargs="*", help="after --, for rsq-stream quantize")
    return parser.parse_args()


def line(row: tuple[str, str, Job], bits: int, options: Any, scratch: Path) -> str:
    """Give a row's line of the table, or what went wrong."""
    label, peer, settings = row
    try:
        if peer == OURS:
            found = measure_ours(bits, options, scratch)
        else:
            found = measure_peer(peer, settings, bits, options, scratch)
    except RuntimeError as error:
        return f"| {label} | {bits} | failed: {error} | | |"
    times = f"{found['quantize']:.1f} | {found['process']:.1f}"
    return f"| {label} | {bits} | {found['perplexity']:.3f} | {times} |"


def main() -> None:
    """Measure every row and print the table, or be the worker of one."""
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
        return
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        windows = save_windows(options, scratch / "windows")
        pins = (f"{OURS} {version(OURS)}", TORCH, *(pin for pin, _ in PEERS.values()))
        print(f"{platform.platform()}, {os.cpu_count()} cores", *pins, sep=", ")
        loop = loop_perplexity(plain_model(options.model), windows["evaluation"])
        own = evaluate(options.model, options)
        print(f"full precision: {own:.4f}, by the loop of the peers: {loop:.4f}\n")
        print("| method | bits | perplexity | quantization s | process s |")
        print("|---|---|---|---|---|", flush=True)
        for bits in options.bits:
            for row in ROWS:
                if options.rows.lower() in row[0].lower():
                    print(line(row, bits, options, scratch), flush=True)


if __name__ == "__main__":
    main()
