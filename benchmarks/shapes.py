"""Plan against run: a model of true shape, few blocks, random weights.

    python benchmarks/shapes.py [--shape 8B] [--blocks 1] [--samples 4]
        [--sequence-length 256] [--bits 2] [--ram 12GiB] [--hard] [--device cpu]
        [--only-plan] [--json]

Writes a checkpoint of Llama-3's 8B, 70B or 405B shape, but with few blocks, or of a
small one (``write_shape.py``), into a temporary folder (in TMPDIR: on a disk, not in
memory), quantizes it in a process of its own, and prints what the plan said beside what
was measured. The weights are random, so nothing is said about quality.

On a GPU it also says how busy that was, and how long the whole model would take. A 70B
model in 20 GiB, activations in host memory and then on disk:

    python benchmarks/shapes.py --device cuda --shape 70B --blocks 1 --samples 128
        --sequence-length 2048 --vram 20GiB --ram 100GiB
    ... the same with --ram 8GiB

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
from pathlib import Path
from typing import Any

_MOST_WORDS = 1 << 18
"""Windows lie at random in the text: more of them need no more text."""
MIB = 1 << 20


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
    """Return what the files of a folder occupy."""
    taken = 0
    with contextlib.suppress(FileNotFoundError):  # it goes away at the end
        for path in folder.rglob("*"):
            taken += path.stat().st_blocks * 512
    return taken


def call(
    arguments: list[str], scratch: Path, *watching: str
) -> tuple[dict[str, Any], Watch]:
    """Run a command with --json; gives what it and its watch say, and its peaks."""
    program = str(Path(__file__).with_name("watched_run.py"))
    process = subprocess.Popen(
        [sys.executable, program, *watching, "--", *arguments, "--json", "--debug"],
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


def figures(
    planned: dict[str, Any], made: dict[str, Any], watch: Watch
) -> dict[str, tuple[float, float]]:
    """Return what was planned and measured, of the run as a whole."""
    execution, stages = made["execution"], made["stages"].values()
    found = {
        "host memory": (
            max(row["predicted_host_bytes"] for row in stages),
            watch.resident,
        ),
        "scratch on disk": (execution["scratch_bytes"], watch.scratch),
        "written in all": (execution["written_bytes"], made["written_bytes"]),
        "output shards": (execution["output_bytes"], made["shard_bytes"]),
        "seconds": (planned["predicted_seconds"], made["seconds"]),
    }
    device = tuple(
        max(row[f"{how}_device_bytes"] for row in stages)
        for how in ("predicted", "measured")
    )
    return {"GPU memory, by the allocator": device} | found if any(device) else found


def report(made: dict[str, Any], found: dict[str, tuple[float, float]]) -> None:
    """Print plan against measured: the run as a whole, then by stage."""
    print("| | planned, MiB | measured, MiB | ratio |\n|---|---|---|---|")
    for name, (expected, took) in found.items():
        unit = 1 if name == "seconds" else MIB
        pair = f"{expected / unit:.1f} | {took / unit:.1f}"
        print(f"| {name} | {pair} | {took / expected:.3f} |")
    on_gpu = bool(made["stages"]["outputs: pass"]["measured_device_bytes"])
    kind, busy = "device" if on_gpu else "host", made["busy"]
    last = " GPU has work |" if busy else ""
    print(f"\n| stage | predicted, s | took, s | planned, MiB | peak, MiB |{last}")
    print("|---|---|---|---|---|" + "---|" * bool(busy))
    for name, row in made["stages"].items():
        memory = (row[f"{how}_{kind}_bytes"] / MIB for how in ("predicted", "measured"))
        took = f"{row['predicted_s']:.1f} | {row['measured_s']:.1f}"
        line = f"| {name} | {took} | {' | '.join(f'{m:.0f}' for m in memory)} |"
        print(line + (f" {busy.get(name, 0):.0%} |" if busy else ""))


def main() -> None:
    """Write, plan, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8B", help="one of write_shape.py's")
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
    parser.add_argument(
        "--kernels", action="store_true", help="profile them (takes host memory)"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rsq-stream-shapes-") as root:
        planned, made, watch, pace = measured(given, Path(root))
    if not made:
        print(json.dumps(planned["execution"], indent=2))
        return
    found = figures(planned, made, watch)
    if given.json:
        print(json.dumps({**found, "anonymous": [watch.anonymous]}))
        return
    print(f"{given.shape} shape, {given.blocks} blocks, {given.samples} windows of")
    print(f"{given.sequence_length} tokens, {given.bits} bits, {given.device};", end="")
    print(f" RssAnon at most {watch.anonymous / MIB:.1f} MiB\n")
    report(made, found)
    if pace:
        print("\n" + pace)


def measured(
    given: argparse.Namespace, root: Path
) -> tuple[dict[str, Any], dict[str, Any], Watch, str]:
    """Write a model and quantize it; without a run where only a plan was wanted."""
    words = min(2 * given.samples * given.sequence_length + 1000, _MOST_WORDS)
    writer = [sys.executable, str(Path(__file__).with_name("write_shape.py")), root]
    sizes = ["--shape", given.shape, "--blocks", given.blocks, "--words", words]
    subprocess.run([str(part) for part in (*writer, *sizes)], check=True)
    folder, output = root / "model", root / "out"
    options = [str(folder), "--output", str(output)]
    options += ["--calibration", str(root / "text.txt"), "--device", given.device]
    names = ("method", "samples", "sequence_length", "bits", "group_size")
    for name in (*names, "ram", "vram", "threads"):
        value = getattr(given, name)
        if value is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    work = output.with_name("out.work")
    planned, watch = call(["plan", *options], work)
    if given.only_plan:
        return planned, {}, watch, ""
    watching = ["--kernels"] * given.kernels
    watching += ["--limit", given.ram] if given.hard else []
    made, watch = call(["quantize", *options], work, *watching)
    shards = output.glob("*.safetensors")
    made["shard_bytes"] = sum(path.stat().st_size for path in shards)
    pace = ""
    if given.device.startswith("cuda"):
        # A script like the others: it measures the disk while the folder is there.
        reader = [sys.executable, str(Path(__file__).with_name("pace.py"))]
        pace = subprocess.run(
            [*reader, str(folder), given.shape],
            input=json.dumps(made),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    return planned, made, watch, pace


if __name__ == "__main__":
    main()
