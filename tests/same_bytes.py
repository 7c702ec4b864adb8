"""Two trees, one toy matrix: does the working tree still write the bytes of a commit?

    python tests/same_bytes.py BASE [--only PATTERN]

Both trees quantize the same random checkpoints: all families, methods, grids,
rotations and importances, runs that stop after each stage and go on, and the command
line. Every file is hashed and compared. Runs that BASE began are finished by the
working tree. No hash is stored, so that this holds on any machine.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("rsq_stream", "cli", "kernels", "tests")
SMALL = {"width": 64, "heads": 4, "kv_heads": 2, "mlp": 88, "vocabulary": 64}
TWO_STREAMS = {"propagate": 0.5, "sweeps": 2, "refit": True, "shrinkage": 1.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"dtype": "bfloat16"},
    "qwen2": {"tied": True},
    "qwen3": {"head_dim": 24},
}
METHODS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in ("rtn", "gptq", "rsq")},
    "two-streams": TWO_STREAMS,
}
IMPORTANCES = (
    *("actnorm", "actnorm-output", "actdiff", "tokensim", "tokenfreq", "cluster"),
    *("first-n", "first-last-n"),
)
OVERRIDES = ("down_proj=4g64", "v_proj@0=16", "o_proj@1=2")
LLAMA: dict[str, dict[str, Any]] = {
    "asymmetric": {"symmetric": False, "signed_scales": False, "bits": 2},
    "static-scales": {"group_scales": "static", "group_size": -1},
    "nf": {"grid": "nf", "bits": 2},
    "nf-two-streams": {"grid": "nf"} | TWO_STREAMS,
    "e8p": {"grid": "e8p", "bits": 2, "group_size": -1},
    "e8p-two-streams": {"grid": "e8p", "bits": 2, "group_size": -1} | TWO_STREAMS,
    "rotate": {"method": "rotate"},
    "rotate-full": {"method": "rotate", "rotation": "full"},
    "quarot": {"method": "quarot"},
    "unrotated": {"rotation": "none"},
    "full": {"rotation": "full"} | TWO_STREAMS,
    "full-rtn": {"rotation": "full", "method": "rtn"},
    "act-order": {"act_order": True},
    "act-order-two-streams": {"act_order": True} | TWO_STREAMS,
    "overrides": {"overrides": OVERRIDES, "head_bits": 4, **TWO_STREAMS},
    "shares": {"propagate_overrides": ("q_proj=0.25",), **TWO_STREAMS},
    "head": {"head_bits": 8, "method": "rtn"},
    "rounded": {"activation_bits": 8, "activation_group_size": 8, **TWO_STREAMS},
    "rounded-kv": {"activation_bits": 4, "activation_symmetric": False, "kv_bits": 4},
    "expanded": {"expand": 3},
    "chunks": {"importance": "chunks", "importance_chunks": "0,2/4"},
    "some-linears": {"importance_linears": ("down_proj", "o_proj")},
    "exact": {"importance_exact": True, "importance_transform": "log"},
    "no-residual": {"residual_correction": False} | TWO_STREAMS,
    "half": {"cache_type": "bfloat16"} | TWO_STREAMS,
    **{name: {"importance": name} for name in IMPORTANCES},
}
BEGUN = ("llama/two-streams", "llama/overrides", "llama/e8p", "qwen2/rsq", "qwen3/rtn")
"""Runs that are stopped, and gone on with by either tree."""
MOMENTS = {"first-stage": "attention out", "third-stage": "mlp out", "block": ""}
"""When they are stopped: in a stage of the second block, or after the first."""
COMMANDS: dict[str, list[str]] = {
    # Options of quantize, for the bundled model.
    "rsq": ["--bits", "2", "--samples", "8"],
    "gptq": ["--method", "gptq", "--bits", "3", "--samples", "8"],
    "bpw": ["--bpw", "9", "--samples", "4"],
    "rtn": ["--method", "rtn", "--rotation", "full"],
}
OPTIONS = ["--sequence-length", "64", "--ram", "4GiB", "--threads", "1"]
NOT_COMPARED = {"seconds", "predicted_seconds", "stages", "used_bytes"}
"""What a machine says differently each time, in JSON that the commands write."""


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return each run's family and settings by its name."""
    named = {
        f"{family}/{name}": (family, settings)
        for family in FAMILIES
        for name, settings in METHODS.items()
    }
    return named | {f"llama/{name}": ("llama", made) for name, made in LLAMA.items()}


def main() -> None:
    """Compare two trees, or work in one for the process that compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="runs by name")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        getattr(Worker(given.tree, given.only), given.work)()
        return
    with tempfile.TemporaryDirectory(prefix="rsq-same-bytes-", dir=memory()) as folder:
        sys.exit(compare(Path(folder), given.base, given.only))


def memory() -> str | None:
    """Return a folder in memory, where there is one: a sync costs nothing there."""
    roomy = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 1 << 32
    return "/dev/shm" if roomy else None


def compare(folder: Path, base: str, only: str) -> int:
    """Have both trees work, at the same time; gives the exit code."""
    command = ["git", "archive", base, *ROOMS]
    packed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder / "commit", filter="data")
    before, here = folder / "before", folder / "here"
    as_installed(folder / "commit", before)
    as_installed(ROOT, here)
    work(only, "toys", here)
    work(only, "everything", before, here)
    shutil.copytree(before / "begun", here / "taken-over")
    work(only, "take_over", here)
    return report(hashes(before / "out"), hashes(here / "out"))


def as_installed(source: Path, tree: Path) -> None:
    """Lay the rooms of a checkout out as a wheel has them, the tests beside."""
    ignored = shutil.ignore_patterns("__pycache__")
    for room in ROOMS:
        outside = room in ("rsq_stream", "tests")
        place = tree / room if outside else tree / "rsq_stream" / room
        shutil.copytree(source / room, place, ignore=ignored)


def work(only: str, part: str, *trees: Path) -> None:
    """Do a part of the work in processes whose ``rsq_stream`` is that of their tree."""
    processes = []
    for tree in trees:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "-"]
        command += ["--only", only, "--work", part, "--tree", str(tree)]
        own = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, env=os.environ | own))
    codes = [process.wait() for process in processes]
    for tree, code in zip(trees, codes, strict=True):
        if code:
            sys.exit(f"FAILED: {part} in the tree {tree.name} ended with {code}")


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by its path there."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def compared(said: dict[str, Any]) -> dict[str, Any]:
    return {
        key: compared(value) if isinstance(value, dict) else value
        for key, value in said.items()
        if key not in NOT_COMPARED
    }


def report(before: dict[str, str], here: dict[str, str]) -> int:
    """Say where two trees differ, and resumed runs from whole ones."""
    expected = dict(before)
    for name in here:
        part, _, rest = name.partition("/")
        if part in ("resumed", "taken-over"):
            expected[name] = before.get(f"whole/{rest.partition('/')[2]}", "nothing")
    names = sorted(expected.keys() | here.keys())
    different = [name for name in names if expected.get(name) != here.get(name)]
    for name in different[:40]:
        print(f"  differs: {name}")
    outputs = len({str(Path(name).parent) for name in here})
    if different or not here:
        print(f"FAILED: {len(different)} of {len(here)} files differ")
        return 1
    taken = len({Path(name).parent for name in here if name.startswith("taken-over")})
    print(
        f"same bytes: {outputs} outputs, {len(here)} files; {taken} begun by the base"
    )
    return 0


class Worker:
    """Makes the outputs of one tree, in ``tree/out``."""

    def __init__(self, tree: Path, only: str) -> None:
        import torch

        import rsq_stream

        assert Path(rsq_stream.__file__).is_relative_to(tree)
        torch.set_num_threads(1)
        self._tree = tree
        self._toys = tree.parent / "toys"
        self._only = only
        moved = (tree / "tests" / "support" / "toy.py").exists()
        self._toy = importlib.import_module(f"tests.{'support.' * moved}toy")

    def toys(self) -> None:
        """Make the checkpoints that both trees read."""
        import torch

        for family, sizes in FAMILIES.items():
            dtype = getattr(torch, sizes.get("dtype", "float32"))
            sizes = SMALL | sizes | {"dtype": dtype}
            with self._toy.calm():
                self._toy.toy_checkpoint(self._toys / family, family=family, **sizes)

    def everything(self) -> None:
        """Make all runs, stop some and go on, and give the commands."""
        with self._toy.calm():
            for name in fnmatch.filter(cases(), self._only):
                self._run(name, self._tree / "out" / "whole" / name)
            for name in fnmatch.filter(BEGUN, self._only):
                for moment in MOMENTS:
                    self._begin(name, moment)
            shutil.copytree(self._tree / "begun", self._tree / "resumed")
            self._go_on("resumed")
        for name in fnmatch.filter(COMMANDS, self._only):
            self._commands(name)

    def take_over(self) -> None:
        """Finish what the other tree began."""
        with self._toy.calm():
            self._go_on("taken-over")

    def _run(self, name: str, output: Path, **call: Any) -> None:
        family, settings = cases()[name]
        self._toy.run_toy(self._toys / family, output, **settings, **call)

    def _begin(self, name: str, moment: str) -> None:
        from rsq_stream.errors import Interrupted
        from rsq_stream.events import BlockFinished, Event, StageStarted

        stop = threading.Event()

        def listen(event: Event) -> None:
            if isinstance(event, StageStarted) and event.stage == MOMENTS[moment]:
                stop.set() if event.block == 1 else None
            if isinstance(event, BlockFinished) and not MOMENTS[moment]:
                stop.set()

        output = self._tree / "begun" / moment / name
        with contextlib.suppress(Interrupted):
            self._run(name, output, listener=listen, stop=stop)

    def _go_on(self, folder: str) -> None:
        for name in fnmatch.filter(BEGUN, self._only):
            for moment in MOMENTS:
                output = self._tree / folder / moment / name
                if not (output / "rsq_stream.json").exists():
                    self._run(name, output)
                shutil.copytree(output, self._tree / "out" / folder / moment / name)

    def _commands(self, name: str) -> None:
        """Quantize the bundled model by the command line, plan, verify, and measure."""
        from rsq_stream.demo import CALIBRATION, HELD_OUT, MODEL

        output = self._tree / "out" / "commands" / name / "model"
        job = ["--calibration", CALIBRATION, *OPTIONS, *COMMANDS[name]]
        job += ["--output", output]
        made = {
            "plan": self._said("plan", MODEL, *job) if name != "bpw" else {},
            "quantize": self._said("quantize", MODEL, *job),
            "verify": self._said("verify", output),
            "eval": self._said("eval", output, "--text", HELD_OUT, "--max-windows", 4),
            "inspect": self._said("inspect", output),
        }
        said = json.dumps(made, indent=1).replace(str(self._tree), "")
        (output.parent / "said.json").write_text(said)

    def _said(self, *command: object) -> Any:
        from rsq_stream.cli.main import main as rsq_stream

        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            rsq_stream([*map(str, command), "--json"])
        said = compared(json.loads(out.getvalue()))
        if "execution" in said:  # fields of one process: their names may change
            said["execution"] = sorted(map(str, said["execution"].values()))
        return said


if __name__ == "__main__":
    main()
