"""Plan against run: a model of true shape, few blocks, random weights.

    python benchmarks/shapes.py [--shape 8B] [--blocks 1] [--samples 4]
        [--sequence-length 256] [--bits 2] [--ram 12GiB] [--device cpu] [--only-plan]

Writes a checkpoint of Llama-3's 8B, 70B or 405B shape, but with few blocks, into a
temporary folder, quantizes it in a process of its own, and prints what the plan said
beside what was measured. The weights are random, so nothing is said about quality.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rsq_stream.model.architecture import block_prefix, read_architecture

SHAPES = {
    "8B": (4096, 14336, 32, 8),
    "70B": (8192, 28672, 64, 8),
    "405B": (16384, 53248, 128, 8),
}
"""Width, MLP width, heads, KV heads (the models' config.json)."""
VOCABULARY = 128256
_WORDS = 512
_PART = 1 << 24
MIB = 1 << 20


def write_model(folder: Path, shape: str, blocks: int) -> None:
    """Write config, tokenizer and one shard, tensor by tensor."""
    width, mlp, heads, kv_heads = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{n}": n for n in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    architecture = read_architecture(config, "here")
    sizes = dict(architecture.outer_shapes())
    for block in range(blocks):
        for name, size in architecture.block_shapes().items():
            sizes[block_prefix(block) + name] = size
    header: dict[str, Any] = {}
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    random = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        content = json.dumps(header).encode()
        file.write(len(content).to_bytes(8, "little") + content)
        for size in sizes.values():
            deviation = 0.0 if len(size) == 1 else size[-1] ** -0.5
            for start in range(0, prod(size), _PART):
                count = min(_PART, prod(size) - start)
                part = torch.randn(count, generator=random) * deviation
                part += 1.0 if len(size) == 1 else 0.0
                file.write(part.bfloat16().view(torch.uint8).numpy().data)


def write_text(path: Path, words: int) -> None:
    """Write random words of the tokenizer."""
    random = torch.Generator().manual_seed(0)
    picked = torch.randint(1, _WORDS, (words,), generator=random).tolist()
    path.write_text(" ".join(f"w{n}" for n in picked))


class Watch:
    """The peaks of a process and its work folder, looked at ten times a second."""

    def __init__(self, process: subprocess.Popen[str], scratch: Path) -> None:
        self.resident = self.scratch = 0
        self._process, self._folder = process, scratch
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        watched = psutil.Process(self._process.pid)
        while self._process.poll() is None:
            try:
                self.resident = max(self.resident, watched.memory_info().rss)
            except psutil.Error:
                return
            files = list(self._folder.rglob("*"))
            taken = sum(p.stat().st_blocks * 512 for p in files if p.exists())
            self.scratch = max(self.scratch, taken)
            time.sleep(0.1)

    def close(self) -> None:
        """Wait for the last look."""
        self._thread.join()


def call(arguments: list[str], scratch: Path) -> tuple[dict[str, Any], Watch, int]:
    """Run a command with --json; gives what it says, its peaks, and bytes written."""
    program = (
        "import sys\n"
        "from rsq_stream.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    import psutil\n"
        "    written = psutil.Process().io_counters().write_bytes\n"
        "    print(f'wrote {written}', file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    watch = Watch(process, scratch)
    out, err = process.communicate()
    watch.close()
    if process.returncode:
        sys.exit(err)
    written = int(err.rpartition("wrote ")[2])
    return json.loads(out), watch, written


def report(planned: dict[str, Any], made: dict[str, Any], watch: Watch, w: int) -> None:
    """Print plan against measured: the run as a whole, then by stage."""
    execution = made["execution"]
    host = max(row["predicted_host_bytes"] for row in made["stages"].values())
    rows = [
        ("host memory", host, watch.resident),
        ("scratch on disk", execution["scratch_bytes"], watch.scratch),
        ("written in all", execution["written_bytes"], w),
        ("output shards", execution["output_bytes"], made["shard_bytes"]),
    ]
    print("| | planned, MiB | measured, MiB | ratio |\n|---|---|---|---|")
    for name, expected, found in rows:
        ratio = found / expected
        print(f"| {name} | {expected / MIB:.1f} | {found / MIB:.1f} | {ratio:.2f} |")
    seconds = planned["predicted_seconds"]
    print(f"| seconds | {seconds:.1f} | {made['seconds']:.1f} | ", end="")
    print(f"{made['seconds'] / seconds:.2f} |\n")
    kind = (
        "device" if made["stages"]["outputs: pass"]["measured_device_bytes"] else "host"
    )
    print("| stage | predicted, s | took, s | planned, MiB | peak, MiB |")
    print("|---|---|---|---|---|")
    for name, row in made["stages"].items():
        memory = (row[f"{how}_{kind}_bytes"] / MIB for how in ("predicted", "measured"))
        took = f"{row['predicted_s']:.1f} | {row['measured_s']:.1f}"
        print(f"| {name} | {took} | {' | '.join(f'{m:.0f}' for m in memory)} |")


def main() -> None:
    """Write, plan, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", default="rsq")
    parser.add_argument("--ram")
    parser.add_argument("--vram")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only-plan", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rsq-stream-shapes-") as root:
        folder, text = Path(root) / "model", Path(root) / "text.txt"
        output = Path(root) / "out"
        write_model(folder, given.shape, given.blocks)
        write_text(text, 2 * given.samples * given.sequence_length + 1000)
        options = [str(folder), "--output", str(output), "--calibration", str(text)]
        names = ("method", "samples", "sequence_length", "bits", "group_size")
        for name in (*names, "ram", "vram"):
            value = getattr(given, name)
            if value is not None:
                options += [f"--{name.replace('_', '-')}", str(value)]
        options += ["--device", given.device]
        if given.threads:
            options += ["--threads", str(given.threads)]
        work = output.with_name("out.work")
        planned, _, _ = call(["plan", *options], work)
        if given.only_plan:
            print(json.dumps(planned["execution"], indent=2))
            return
        made, watch, written = call(["quantize", *options], work)
        shards = output.glob("*.safetensors")
        made["shard_bytes"] = sum(path.stat().st_size for path in shards)
        print(f"{given.shape} shape, {given.blocks} blocks, {given.samples} windows of")
        print(f"{given.sequence_length} tokens, {given.bits} bits, {given.device}\n")
        report(planned, made, watch, written)


if __name__ == "__main__":
    main()
