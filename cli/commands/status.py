"""``rsq-stream status``: where a run stands, also while it goes on."""

import json
import statistics
from pathlib import Path
from typing import Any

from rsq_stream.config.schemes import UNQUANTIZED
from rsq_stream.errors import ScratchError
from rsq_stream.storage.journal import NAME, Journal
from rsq_stream.storage.work_folder import MEASURED

from ..display.text import duration, facts, say, say_json, table
from ..options.common import Debug, Json, Quiet, WorkDir

_FIELDS = ("method", "bits", "group_size", "residual_rotation", "calibration")
_WORST = 5


def status(
    work_dir: WorkDir,
    *,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show where a run stands, from its journal; never disturbs it."""
    del quiet, debug
    found = read_status(work_dir)
    if as_json:
        say_json(found)
        return
    done = f"{found['blocks_done']}"
    if found["blocks"] is not None:
        done += f" of {found['blocks']}"
    rows = {
        "state": _state(found),
        "blocks done": done,
        "plan": _plan(found["plan"]),
    }
    if found["seconds_per_block"] is not None:
        rows["time per block"] = f"{found['seconds_per_block']:.1f} s"
        if found["blocks"] is not None:
            left = (found["blocks"] - found["blocks_done"]) * found["seconds_per_block"]
            rows["still to go"] = duration(left)
    say(facts(rows))
    if found["worst_linears"]:
        lines = [
            (made["name"], f"{made['relative_error']:.4f}")
            for made in found["worst_linears"]
        ]
        say("\n" + table(("worst linears", "relative error"), lines))


def read_status(work_dir: Path) -> dict[str, Any]:
    """Read the journal without writing to it.

    Raises
    ------
    ScratchError
        The folder holds no journal, or one that cannot be read.
    """
    path = work_dir / NAME
    measuring = not path.is_file() and (work_dir / MEASURED / NAME).is_file()
    if measuring:
        work_dir = work_dir / MEASURED
        path = work_dir / NAME
    if not path.is_file():
        raise ScratchError(
            f"{work_dir}: no run here ({NAME} is missing); give the --work-dir of an"
            " unfinished run, a finished one has removed it"
        )
    with Journal(path, read_only=True) as journal:
        plan = json.loads(journal.get("plan") or "{}")
        done = journal.finished_blocks
        total = journal.get("blocks")
        seconds = journal.block_seconds()
        # What --bpw measures is no error of anything that was made.
        linears = [] if measuring else list(journal.linears().values())
    timed = seconds[-done:] if done else []  # the first row is no block: embeddings
    linears.sort(key=lambda made: float(made["relative_error"]), reverse=True)
    return {
        "work_dir": str(work_dir),
        "measuring": measuring,
        "process": running_process(work_dir),
        "blocks_done": done,
        "blocks": int(total) if total else None,
        "seconds_per_block": statistics.mean(timed) if timed else None,
        "worst_linears": linears[:_WORST],
        "plan": plan,
    }


def running_process(work_dir: Path) -> int | None:
    """Return the process that works in the folder, None where none does.

    The lock file names it; a number that was given to another process since then
    belongs to one younger than the file.
    """
    import psutil

    lock = work_dir / "lock"
    try:
        process = int(lock.read_text())
        began = psutil.Process(process).create_time()
        return process if began <= lock.stat().st_mtime + 1 else None
    except (OSError, ValueError, psutil.Error):
        return None


def _plan(plan: dict[str, Any]) -> str:
    """Say what is made; bits of activations only where they are rounded."""
    parts = [f"{name} {plan.get(name)}" for name in _FIELDS]
    bits = {
        name: plan.get(name, UNQUANTIZED) for name in ("activation_bits", "kv_bits")
    }
    parts += [f"{name} {given}" for name, given in bits.items() if given != UNQUANTIZED]
    return ", ".join(parts)


def _state(found: dict[str, Any]) -> str:
    if found["measuring"]:
        if found["blocks_done"] == found["blocks"]:
            return "what bits cost is measured; quantize --bpw X goes on from there"
        what = "measuring what bits cost, before the run itself"
        if found["process"] is not None:
            return f"{what}; process {found['process']}"
        return f"stopped while {what}; the same command goes on"
    if found["process"] is not None:
        return f"running, process {found['process']}"
    if found["blocks_done"] == found["blocks"]:
        return "every block is done; the same quantize command completes the output"
    return "stopped; the same quantize command goes on"
