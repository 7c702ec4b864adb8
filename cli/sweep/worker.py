"""One run of a sweep, in a process of its own: ``python -m ... TASK``.

Quantizes, evaluates, and writes the result as one file; each goes on where a process
before this one stopped. The process ends with the one that started it, however that
one ends: its stdin is the other end of a pipe.
"""

import dataclasses
import json
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsq_stream.errors import Interrupted, RsqError
from rsq_stream.storage import atomic

from ..commands.quantize import quantize
from ..display.text import say_aside
from ..options.quantize_options import QuantizeOptions
from ..signals import INTERRUPTED
from .folder import OUTPUT

_QUANTIZED = "quantized.json"
"""What is known of the finished model; while it is there, only the evaluation is left.
"""


def main(task: Path) -> int:
    """Do the run that a file describes; gives the exit code, the log's end says why."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        run(task.parent, json.loads(task.read_bytes()))
    except (KeyboardInterrupt, Interrupted):
        return INTERRUPTED
    except RsqError as error:
        say_aside(f"error: {' '.join(str(error).splitlines())}")
        return 1
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).splitlines())
        say_aside(f"error: {type(error).__name__}: {text}; please report")
        return 1
    return 0


def _end_with_parent() -> None:
    # Nobody writes there: the read ends when the process that started this one does.
    os.read(sys.stdin.fileno(), 1)
    os._exit(INTERRUPTED)  # durable state needs no goodbye


def run(folder: Path, task: Mapping[str, Any]) -> None:
    """Quantize, evaluate, write the result; then remove what is not to be kept."""
    output = folder / OUTPUT
    work_dir = folder / f"{OUTPUT}.work"
    made = _quantized(folder / _QUANTIZED, output, work_dir, task)
    from rsq_stream import api

    evaluated = api.evaluate(
        output,
        task["text"],
        **task["eval"],
        device=task["job"]["device"],
        threads=task["job"]["threads"],
    )
    found = dataclasses.asdict(evaluated.evaluation)
    result = {
        **task["about"],
        **{name: found[name] for name in ("perplexity", "loss", "windows", "tokens")},
        "evaluation_seconds": found["seconds"],
        **made,
        "output": str(output.resolve()) if task["keep_model"] else None,
    }
    content = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    atomic.write_file(Path(task["result"]), content.encode())


def _quantized(
    known: Path, output: Path, work_dir: Path, task: Mapping[str, Any]
) -> dict[str, Any]:
    """Quantize, unless that is done; gives what the result has of it."""
    from rsq_stream.checkpoint.manifest import read_manifest

    if not known.is_file():
        # The work folder is kept until this is noted: it has the time of every block,
        # whichever process did it.
        options = QuantizeOptions(
            **task["job"], output=output, work_dir=work_dir, keep_work=True
        )
        quantize(task["model"], options=options)
        manifest = read_manifest(output)
        made = {
            "bits_per_weight": manifest["bits_per_weight"],
            "seconds": _seconds(work_dir),
            "output_bytes": sum(file.stat().st_size for file in output.iterdir()),
            "plan_sha256": manifest["plan_sha256"],
            "versions": manifest["versions"],
        }
        atomic.write_file(known, json.dumps(made).encode())
    atomic.remove_tree(work_dir)
    return dict(json.loads(known.read_bytes()))


def _seconds(work_dir: Path) -> float:
    """Return the time that all blocks took, those of --bpw's measuring included."""
    from rsq_stream.storage.journal import NAME, Journal
    from rsq_stream.storage.work_folder import MEASURED

    total = 0.0
    for folder in (work_dir, work_dir / MEASURED):
        if (folder / NAME).is_file():
            with Journal(folder / NAME, read_only=True) as journal:
                total += sum(journal.block_seconds())
    return total


def task_of(job: QuantizeOptions) -> dict[str, Any]:
    """Return a job as a task's file has it: without what the run's folder decides."""
    fields = dataclasses.asdict(job)
    for name in ("output", "work_dir", "keep_work", "preset"):
        del fields[name]
    return fields


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
