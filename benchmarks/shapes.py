"""Plan against run: a model of true shape, few blocks, random weights.

    python benchmarks/shapes.py [--shape 8B] [--blocks 1] [--samples 4]
        [--sequence-length 256] [--bits 2] [--ram 12GiB] [--device cpu] [--only-plan]

On a GPU it also says how busy that was, and how long the whole model would take. A 70B
model in 20 GiB, activations in host memory and then on disk (TMPDIR says which one):

    python benchmarks/shapes.py --device cuda --shape 70B --blocks 1 --samples 128
        --sequence-length 2048 --vram 20GiB --ram 100GiB
    ... the same with --ram 8GiB

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
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rsq_stream.model.architecture import block_prefix, read_architecture
from rsq_stream.storage.activations import has_direct_io
from rsq_stream.storage.atomic import sync_file
from rsq_stream.storage.chunk_file import aligned_empty, read_chunk, write_chunk

SHAPES = {
    "8B": (4096, 14336, 32, 8),
    "70B": (8192, 28672, 64, 8),
    "405B": (16384, 53248, 128, 8),
}
"""Width, MLP width, heads, KV heads (the models' config.json)."""
BLOCKS = {"8B": 32, "70B": 80, "405B": 126}
OUTSIDE = "embedding and head"
VOCABULARY = 128256
_WORDS = 512
_PART = 1 << 24
_RAW_BYTES = 512 << 20
MIB = 1 << 20


def config_of(shape: str, blocks: int) -> dict[str, Any]:
    """Give config.json of a model of so many blocks."""
    width, mlp, heads, kv_heads = SHAPES[shape]
    return {
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


def write_model(folder: Path, shape: str, blocks: int) -> None:
    """Write config, tokenizer and one shard, tensor by tensor."""
    config = config_of(shape, blocks)
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


def disk_rates(folder: Path) -> tuple[float, float]:
    """Give bytes a second that a file is read and durably written with, raw."""
    direct, path = has_direct_io(folder), folder / "raw"
    content = aligned_empty(_RAW_BYTES)
    content.fill(1)
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        write_chunk(path, content, direct=direct)
        sync_file(path)
        middle = time.perf_counter()
        read_chunk(path, _RAW_BYTES, direct=direct)
        spent.append((time.perf_counter() - middle, middle - began))
    path.unlink()
    read_s, written_s = (min(each) for each in zip(*spent, strict=True))
    return _RAW_BYTES / read_s, _RAW_BYTES / written_s


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


def call(
    arguments: list[str], scratch: Path, *, kernels: bool = False
) -> tuple[dict[str, Any], Watch]:
    """Run a command with --json; gives what it and its watch say, and its peaks."""
    program = [str(Path(__file__).with_name("watched_run.py"))]
    program += ["--kernels"] * kernels
    process = subprocess.Popen(
        [sys.executable, *program, *arguments, "--json"],
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
    seen = json.loads(err.strip().rpartition("\n")[2])
    return json.loads(out) | seen, watch


def report(planned: dict[str, Any], made: dict[str, Any], watch: Watch) -> None:
    """Print plan against measured: the run as a whole, then by stage."""
    execution = made["execution"]
    host = max(row["predicted_host_bytes"] for row in made["stages"].values())
    rows = [
        ("host memory", host, watch.resident),
        ("scratch on disk", execution["scratch_bytes"], watch.scratch),
        ("written in all", execution["written_bytes"], made["written_bytes"]),
        ("output shards", execution["output_bytes"], made["shard_bytes"]),
    ]
    device = [
        max(row[f"{how}_device_bytes"] for row in made["stages"].values())
        for how in ("predicted", "measured")
    ]
    if any(device):
        rows.insert(0, ("GPU memory, by the allocator", *device))
    print("| | planned, MiB | measured, MiB | ratio |\n|---|---|---|---|")
    for name, expected, found in rows:
        ratio = found / expected
        print(f"| {name} | {expected / MIB:.1f} | {found / MIB:.1f} | {ratio:.2f} |")
    seconds = planned["predicted_seconds"]
    print(f"| seconds | {seconds:.1f} | {made['seconds']:.1f} | ", end="")
    print(f"{made['seconds'] / seconds:.2f} |\n")
    on_gpu = bool(made["stages"]["outputs: pass"]["measured_device_bytes"])
    kind, busy = "device" if on_gpu else "host", made["busy"]
    print(
        "| stage | predicted, s | took, s | planned, MiB | peak, MiB | GPU has work |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in made["stages"].items():
        memory = (row[f"{how}_{kind}_bytes"] / MIB for how in ("predicted", "measured"))
        took = f"{row['predicted_s']:.1f} | {row['measured_s']:.1f}"
        memory_text = " | ".join(f"{m:.0f}" for m in memory)
        share = f"{busy[name]:.0%}" if name in busy else "-"
        print(f"| {name} | {took} | {memory_text} | {share} |")


@dataclass(frozen=True)
class Pace:
    """How long a block took, and what it could not have been faster than."""

    block_s: float
    outside_s: float
    compute_s: float
    """The GPU had work."""
    moved_bytes: int
    """Read and written in a block: activations that are not in memory, and shards."""
    disk_s: float

    @property
    def floor_s(self) -> float:
        """Give the longer of compute and disk."""
        return max(self.compute_s, self.disk_s)


def pace_of(
    made: dict[str, Any], shape: str, blocks: int, read: float, written: float
) -> Pace:
    """Give a run's pace; the disk reads and writes so many bytes a second.

    A block's passes read five slots of each stream and write two, durably.
    """
    plan, execution = made["plan"], made["execution"]
    stages = {name: row["measured_s"] for name, row in made["stages"].items()}
    outside_s = stages.pop(OUTSIDE)
    busy_s = sum(made["busy"].get(name, 0.0) * s for name, s in stages.items())
    streams, slot = execution["slots"] // 3, execution["slot_bytes"]
    units = -(-plan["samples"] * plan["expand"] // plan["unit_sequences"])
    on_disk = 1 - execution["resident_units"] / units
    sizes = read_architecture(config_of(shape, blocks), "here").block_shapes()
    weights = sum(map(prod, sizes.values()))
    reads = int(5 * streams * slot * on_disk) + 2 * weights
    writes = 2 * streams * slot + weights * plan["bits"] // 8
    return Pace(
        block_s=sum(made["block_s"]) / blocks,
        outside_s=outside_s,
        compute_s=busy_s / blocks,
        moved_bytes=reads + writes,
        disk_s=reads / read + writes / written,
    )


def report_pace(made: dict[str, Any], pace: Pace, shape: str) -> None:
    """Print what a block takes, against its floor, and what the whole model would."""
    print(f"\na block: {pace.block_s:.1f} s, of which the GPU had work", end=" ")
    print(f"{pace.compute_s:.1f} s ({pace.compute_s / pace.block_s:.0%})")
    if "kernel_s" in made:
        share = made["kernel_s"] / made["seconds"]
        print(f"kernels alone: {made['kernel_s']:.1f} s of the run, {share:.0%}")
    print(f"disk: {pace.moved_bytes / 2**30:.2f} GiB, {pace.disk_s:.1f} s at its rate")
    ratio = pace.block_s / max(pace.floor_s, 1e-9)
    print(f"a block takes {ratio:.2f} of the longer of compute and disk")
    whole_s = pace.outside_s + BLOCKS[shape] * pace.block_s
    print(f"{BLOCKS[shape]} blocks, embedding and head: {whole_s / 3600:.2f} hours")


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
    parser.add_argument(
        "--kernels", action="store_true", help="profile them (takes host memory)"
    )
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
        planned, _ = call(["plan", *options], work)
        if given.only_plan:
            print(json.dumps(planned["execution"], indent=2))
            return
        made, watch = call(["quantize", *options], work, kernels=given.kernels)
        shards = output.glob("*.safetensors")
        made["shard_bytes"] = sum(path.stat().st_size for path in shards)
        print(f"{given.shape} shape, {given.blocks} blocks, {given.samples} windows of")
        print(f"{given.sequence_length} tokens, {given.bits} bits, {given.device}\n")
        report(planned, made, watch)
        if given.device.startswith("cuda"):
            read, written = disk_rates(Path(root))
            pace = pace_of(made, given.shape, given.blocks, read, written)
            report_pace(made, pace, given.shape)


if __name__ == "__main__":
    main()
