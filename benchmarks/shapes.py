"""Plan against run: a model of true shape, few blocks, random weights.

    python benchmarks/shapes.py [--shape 8B] [--blocks 1] [--samples 4]
        [--sequence-length 256] [--bits 2] [--ram 12GiB] [--hard] [--device cpu]
        [--only-plan] [--json]

Writes a checkpoint of Llama-3's 8B, 70B or 405B shape, but with few blocks, or of a
small one, into a temporary folder (in TMPDIR: on a disk, not in memory), quantizes it
in a process of its own, and prints what the plan said beside what was measured. The
weights are random, so nothing is said about quality.

``--ram`` is about resident memory, that of mapped libraries included: VmHWM, the
kernel's own mark. RssAnon, of which no library is part, is given beside it.

``--hard`` has the kernel refuse what goes beyond ``--ram``: RLIMIT_DATA, set when torch
and this package are imported, is what the process has of writable private memory by
then, as much as ``--ram`` leaves beside its resident memory, and 384 MiB. These are for
memory that was asked for and is not touched, which counts as well: threads' stacks, and
what of the heap was given back. RLIMIT_AS would count what torch maps of its libraries
besides, and a memory cgroup takes privileges that few have.
"""

import argparse
import contextlib
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

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rsq_stream.model.architecture import block_prefix, read_architecture

SHAPES = {
    "8B": (4096, 14336, 32, 8, 128256),
    "70B": (8192, 28672, 64, 8, 128256),
    "405B": (16384, 53248, 128, 8, 128256),
    "narrow": (256, 768, 4, 4, 4096),
    "4M": (512, 2048, 8, 8, 4096),
}
"""Width, MLP width, heads, KV heads, vocabulary (of the first three, the models')."""
_WORDS = 512
_MOST_WORDS = 1 << 18
"""Windows lie at random in the text: more of them need no more text."""
_PART = 1 << 24
MIB = 1 << 20


def write_model(folder: Path, shape: str, blocks: int) -> None:
    """Write config, tokenizer and one shard, tensor by tensor."""
    width, mlp, heads, kv_heads, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
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
    """The peaks of a process and its work folder, looked at twenty times a second."""

    def __init__(self, process: subprocess.Popen[str], scratch: Path) -> None:
        self.resident = self.anonymous = self.scratch = 0
        self._process, self._folder = process, scratch
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        status, due = Path(f"/proc/{self._process.pid}/status"), 0.0
        while self._process.poll() is None:
            for line in status.read_text().splitlines():
                key, _, value = line.partition(":")
                if key == "VmHWM":
                    self.resident = int(value.split()[0]) << 10
                elif key == "RssAnon":
                    self.anonymous = max(self.anonymous, int(value.split()[0]) << 10)
            began = time.monotonic()
            if began >= due:
                self.scratch = max(self.scratch, allocated(self._folder))
                # Thousands of chunks: looking at them should not take the disk's time.
                due = time.monotonic() + 20 * (time.monotonic() - began)
            time.sleep(0.05)

    def close(self) -> None:
        """Wait for the last look."""
        self._thread.join()


def allocated(folder: Path) -> int:
    """Give what the files of a folder occupy."""
    taken = 0
    with contextlib.suppress(FileNotFoundError):  # it goes away at the end
        for path in folder.rglob("*"):
            taken += path.stat().st_blocks * 512
    return taken


PROGRAM = """
import resource, sys, psutil
import rsq_stream.bits_choice, rsq_stream.pipeline, rsq_stream.planner
from rsq_stream.cli.main import main
from rsq_stream.cli.text import parse_size

def kept(key):
    words = open("/proc/self/status").read().split()
    return int(words[words.index(key) + 1]) << 10

if sys.argv[1]:
    left = parse_size("--ram", sys.argv[1]) - kept("VmRSS:")
    limit = kept("VmData:") + left + (384 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    main(sys.argv[2:])
finally:
    print(f"wrote {psutil.Process().io_counters().write_bytes}", file=sys.stderr)
"""


def call(
    arguments: list[str], scratch: Path, limit: str = ""
) -> tuple[dict[str, Any], Watch, int]:
    """Run a command with --json; gives what it says, its peaks, and bytes written."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, limit, *arguments, "--json"],
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


def figures(
    planned: dict[str, Any], made: dict[str, Any], watch: Watch, written: int
) -> dict[str, tuple[float, float]]:
    """Give what was planned and measured, of the run as a whole."""
    execution = made["execution"]
    host = max(row["predicted_host_bytes"] for row in made["stages"].values())
    return {
        "host memory": (host, watch.resident),
        "scratch on disk": (execution["scratch_bytes"], watch.scratch),
        "written in all": (execution["written_bytes"], written),
        "output shards": (execution["output_bytes"], made["shard_bytes"]),
        "seconds": (planned["predicted_seconds"], made["seconds"]),
    }


def report(made: dict[str, Any], found: dict[str, tuple[float, float]]) -> None:
    """Print plan against measured: the run as a whole, then by stage."""
    print("| | planned, MiB | measured, MiB | ratio |\n|---|---|---|---|")
    for name, (expected, took) in found.items():
        unit = 1 if name == "seconds" else MIB
        pair = f"{expected / unit:.1f} | {took / unit:.1f}"
        print(f"| {name} | {pair} | {took / expected:.3f} |")
    kind = (
        "device" if made["stages"]["outputs: pass"]["measured_device_bytes"] else "host"
    )
    print("\n| stage | predicted, s | took, s | planned, MiB | peak, MiB |")
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
    parser.add_argument("--hard", action="store_true", help="needs --ram")
    parser.add_argument("--json", action="store_true", help="of the run as a whole")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rsq-stream-shapes-") as root:
        folder, text = Path(root) / "model", Path(root) / "text.txt"
        output = Path(root) / "out"
        write_model(folder, given.shape, given.blocks)
        words = 2 * given.samples * given.sequence_length + 1000
        write_text(text, min(words, _MOST_WORDS))
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
        limit = given.ram if given.hard else ""
        made, watch, written = call(["quantize", *options], work, limit)
        shards = output.glob("*.safetensors")
        made["shard_bytes"] = sum(path.stat().st_size for path in shards)
        found = figures(planned, made, watch, written)
    if given.json:
        print(json.dumps({**found, "anonymous": [watch.anonymous]}))
        return
    print(f"{given.shape} shape, {given.blocks} blocks, {given.samples} windows of")
    print(f"{given.sequence_length} tokens, {given.bits} bits, {given.device};", end="")
    print(f" RssAnon at most {watch.anonymous / MIB:.1f} MiB\n")
    report(made, found)


if __name__ == "__main__":
    main()
