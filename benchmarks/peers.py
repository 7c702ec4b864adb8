"""Perplexity and time of other quantizers and of this one, as a table.

    python benchmarks/peers.py [--bits 2 3] [--rows GPTQ] [-- --asymmetric ...]

Same model, calibration windows and evaluation windows for all, on the CPU. Each
peer runs in a virtual environment of its own, made at the first run (about a
gigabyte each); what follows ``--`` goes to ``rsq-stream quantize``.

Quantization seconds go from the loaded model to the quantized one in memory, for
rsq-stream from the opened model to the written one. Process seconds are those of
the whole process, imports and loading included, without the evaluation. Only the
linear layers of the blocks are quantized; the peers compute in fp32.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TORCH = "torch==2.13.0"
REQUIREMENTS = {
    "llm-compressor": "llmcompressor==0.14.0.1",
    "gptqmodel": "gptqmodel==7.6.0",
    "auto-round": "auto-round==0.16.1",
}
ENVIRONMENT = {
    "BUILD_CUDA_EXT": "0",  # of GPTQModel's installation
    "CUDA_VISIBLE_DEVICES": "",
    "GPTQMODEL_CPU_WORKERS": "2",  # it asks for two, but makes one of two cores
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",  # this folder's run.py must not hide another's module
    "TOKENIZERS_PARALLELISM": "false",
}
OURS, FULL = "rsq-stream", "full precision"


@dataclass(frozen=True)
class Row:
    """A line of the table: who quantizes, and with what."""

    label: str
    peer: str
    settings: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("llm-compressor, GPTQ as is", "llm-compressor"),
    Row(
        "llm-compressor, GPTQ, rotation, MSE scales, asymmetric",
        "llm-compressor",
        {
            "rotations": ["R1", "R2"],
            "symmetric": False,
            "observer": "memoryless_mse",
            "observer_kwargs": {"maxshrink": 0.8, "patience": 80},
        },
    ),
    Row("GPTQModel, GPTQ as is", "gptqmodel"),
    Row(
        "GPTQModel, GPTQ, MSE scales, asymmetric",
        "gptqmodel",
        {"mse": 2.4, "sym": False},
    ),
    Row("auto-round, 200 iterations, asymmetric", "auto-round", {"sym": False}),
    Row(OURS, OURS),
)


class Stages:
    """Seconds of each stage of a worker, from its start on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """Note that a stage has ended and the next begins."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


# Workers: each runs in its peer's environment, and so imports inside itself.


def full_precision(model: Path, windows: Any, options: Any, stages: Stages) -> Any:
    """Load the model and leave it as it is."""
    return plain_model(model)


def llm_compressor(model: Path, windows: Any, options: Any, stages: Stages) -> Any:
    """Quantize by GPTQModifier, after SpinQuantModifier where rotations are given."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from torch.utils.data import DataLoader

    stages.end("import")
    loaded = plain_model(model)
    stages.end("load")
    settings = dict(options.settings)
    rotations = settings.pop("rotations", None)
    weights = QuantizationArgs(
        **{"symmetric": True, **settings},
        num_bits=options.bits,
        group_size=options.group_size,
        strategy="group",
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = [GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])]
    if rotations:
        recipe.insert(0, SpinQuantModifier(rotations=rotations))
    rows = [{"input_ids": window, "attention_mask": window**0} for window in windows]
    return oneshot(
        model=loaded,
        dataset=DataLoader(rows, batch_size=1),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=windows.shape[1],
    )


def gptqmodel(model: Path, windows: Any, options: Any, stages: Stages) -> Any:
    """Quantize by GPTQModel; its packed linears become plain ones again."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    stages.end("import")
    config = QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size,
        format="gptq_v2",  # zero points as they are, not less one
        offload_to_disk=False,
        **options.settings,
    )
    loaded = GPTQModel.load(str(model), config, dtype=torch.float32, device="cpu")
    stages.end("load")
    loaded.quantize([{"input_ids": window.tolist()} for window in windows])
    stages.end("quantize")
    for name, packed in list(loaded.model.named_modules()):
        if hasattr(packed, "dequantize_weight"):
            weight_OI = packed.eval().dequantize_weight().T.float().clone()
            linear = torch.nn.Linear(*weight_OI.shape[::-1], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
            loaded.model.set_submodule(name, linear)
    return loaded.model


def auto_round(model: Path, windows: Any, options: Any, stages: Stages) -> Any:
    """Tune roundings by signed gradients; the weights end up on the grid."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    stages.end("import")
    loaded = plain_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    stages.end("load")
    tuner = AutoRound(
        loaded,
        tokenizer,
        bits=options.bits,
        group_size=options.group_size,
        dataset=list(windows.split(8)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        **{"iters": 200, **options.settings},
    )
    return tuner.quantize()[0]


WORKERS: dict[str, Callable[..., Any]] = {
    FULL: full_precision,
    "llm-compressor": llm_compressor,
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
}


def plain_model(folder: Path) -> Any:
    """Load a model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def loop_perplexity(model: Any, windows: Any) -> float:
    """Give exp of the mean fp32 loss of tokens 2 .. T of each window."""
    import torch

    model = model.float().eval()
    loss = 0.0
    with torch.inference_mode():
        for window_BT in windows.split(4):
            logits = model(input_ids=window_BT, use_cache=False).logits[:, :-1].float()
            loss += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), window_BT[:, 1:].flatten(), reduction="sum"
            ).item()
    return float(torch.tensor(loss / windows[:, 1:].numel()).double().exp())


def work(options: argparse.Namespace) -> None:
    """Quantize in this process, measure, leave a JSON file."""
    stages = Stages()
    from safetensors.torch import load_file

    windows = load_file(options.windows)
    worker = WORKERS[options.worker]
    made = worker(options.model, windows["calibration"], options, stages)
    if "quantize" not in stages.seconds:
        stages.end("quantize")
    found = {"perplexity": loop_perplexity(made, windows["evaluation"])}
    stages.end("evaluate")
    options.result.write_text(json.dumps(found | stages.seconds))


# The driver: runs in the environment of rsq-stream.


def run(command: list[object], log: Path) -> float:
    """Run a command and give its seconds; its last line is the error's text."""
    began = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE if log.suffix == ".json" else file,
            stderr=file,
            env=os.environ | ENVIRONMENT,
            check=False,
        )
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise RuntimeError(lines[-1])
    if done.stdout is not None:
        log.write_bytes(done.stdout)
    return time.perf_counter() - began


def environment(peer: str, folder: Path) -> Path:
    """Give a peer's python; its environment is made unless it stands."""
    place = folder / peer
    python = place / "bin" / "python"
    wanted = f"{TORCH} {REQUIREMENTS[peer]}"
    stamp = place / "installed.txt"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"installing {wanted} in {place}", file=sys.stderr, flush=True)
    place.mkdir(parents=True, exist_ok=True)
    log = place / "install.log"
    seconds = run([sys.executable, "-m", "venv", place], log)
    for requirement in ((TORCH, "numpy"), (TORCH, REQUIREMENTS[peer])):
        seconds += run([python, "-m", "pip", "install", *requirement], log)
    stamp.write_text(wanted)
    print(f"installed in {seconds:.0f} s", file=sys.stderr, flush=True)
    return python


def measure(row: Row, bits: int, options: argparse.Namespace, scratch: Path) -> dict:
    """Quantize and measure one row in processes of its own."""
    if row.peer == OURS:
        return measure_ours(bits, options, scratch)
    python = sys.executable
    if row.peer in REQUIREMENTS:
        python = environment(row.peer, options.environments)
    result = scratch / "result.json"
    command = [python, Path(__file__).resolve(), "--worker", row.peer]
    command += ["--model", options.model, "--bits", bits, "--result", result]
    command += ["--group-size", options.group_size, "--windows", scratch / "windows"]
    command += ["--settings", json.dumps(row.settings)]
    seconds = run(command, scratch / "log")
    found = json.loads(result.read_text())
    return found | {"process": seconds - found["evaluate"]}


def measure_ours(bits: int, options: argparse.Namespace, scratch: Path) -> dict:
    """Quantize and measure by the installed command."""
    program = Path(sys.executable).with_name("rsq-stream")
    log = scratch / "log.json"
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        output = Path(folder) / "model"
        command = [program, "quantize", options.model, "--bits", bits, "--json"]
        command += ["--group-size", options.group_size, "--output", output]
        command += ["--calibration", options.calibration, "--seed", options.seed]
        command += ["--samples", options.samples, "--device", "cpu"]
        command += ["--sequence-length", options.sequence_length, *options.extra]
        seconds = run(command, log)
        made = json.loads(log.read_text())
        perplexity = evaluate(output, options, log)
    return {"perplexity": perplexity, "quantize": made["seconds"], "process": seconds}


def evaluate(model: Path, options: argparse.Namespace, log: Path) -> float:
    """Measure a folder by the installed command."""
    command = [Path(sys.executable).with_name("rsq-stream"), "eval", model, "--json"]
    command += ["--text", options.text, "--sequence-length", options.sequence_length]
    if options.max_windows is not None:
        command += ["--max-windows", options.max_windows]
    run([*command, "--device", "cpu"], log)
    return json.loads(log.read_text())["perplexity"]


def save_windows(options: argparse.Namespace, path: Path) -> None:
    """Save the calibration windows that rsq-stream takes, and the evaluation's."""
    from safetensors.torch import save_file

    from rsq_stream.calibration import choose_windows, load_tokenizer, read_text
    from rsq_stream.evaluation.perplexity import evaluation_windows

    tokenizer = load_tokenizer(options.model)
    calibration = read_text(str(options.calibration), options.seed)
    length, name = options.sequence_length, str(options.calibration)
    chosen = choose_windows(
        calibration, tokenizer, options.samples, length, options.seed, name
    )
    evaluation = evaluation_windows(
        options.text.read_text(encoding="utf-8"),
        tokenizer,
        length,
        bos=False,
        max_windows=options.max_windows,
        where=str(options.text),
    )
    save_file({"calibration": chosen, "evaluation": evaluation.contiguous()}, path)


def parse() -> argparse.Namespace:
    """Read the command line, a worker's too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cache = Path.home() / ".cache" / "rsq-stream" / "peers"
    parser.add_argument("--environments", type=Path, default=cache, metavar="DIR")
    parser.add_argument("--model", type=Path, help="a folder; the demo model if none")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path, help="to evaluate on")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the windows")
    parser.add_argument("--max-windows", type=int, help="to evaluate on; all if none")
    parser.add_argument("--rows", default="", help="only rows that have this in them")
    parser.add_argument("extra", nargs="*", help="after --, for rsq-stream quantize")
    for name in ("--worker", "--settings"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--windows", "--result"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every row and print the table, or be the worker of one."""
    options = parse()
    if options.worker:
        options.bits, options.settings = options.bits[0], json.loads(options.settings)
        work(options)
        return
    import torch

    from rsq_stream.demo import CALIBRATION, HELD_OUT, MODEL

    options.model = options.model or MODEL
    options.calibration = options.calibration or CALIBRATION
    options.text = options.text or HELD_OUT
    pins = ", ".join(REQUIREMENTS.values())
    print(f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"peers: {TORCH}, {pins}; {options.samples} x {options.sequence_length}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        save_windows(options, scratch / "windows")
        own = evaluate(options.model, options, scratch / "log.json")
        loop = measure(Row(FULL, FULL), 16, options, scratch)["perplexity"]
        print(
            f"full precision: {own:.4f}; by the loop used for the peers: {loop:.4f}\n"
        )
        print("| method | bits | perplexity | quantization s | process s |")
        print("|---|---|---|---|---|")
        for bits in options.bits:
            for row in ROWS:
                if options.rows.lower() in row.label.lower():
                    print(line(row, bits, options, scratch), flush=True)


def line(row: Row, bits: int, options: argparse.Namespace, scratch: Path) -> str:
    """Give a row's line of the table, or what went wrong."""
    try:
        found = measure(row, bits, options, scratch)
    except RuntimeError as error:
        reason = str(error).replace("|", "/")
        return f"| {row.label} | {bits} | failed: {reason} | | |"
    return (
        f"| {row.label} | {bits} | {found['perplexity']:.3f}"
        f" | {found['quantize']:.1f} | {found['process']:.1f} |"
    )


if __name__ == "__main__":
    main()
