"""``rsq-stream verify``: whether an output is, bit for bit, what was written."""

from dataclasses import asdict
from pathlib import Path

import typer

from ..display.text import exact_size, facts, remark, say, say_json, table
from ..options.common import Debug, Json, OutputFolder, Quiet, VerifyAgainst
from ..options.resolve import open_checkpoint

_WORST = 10


def verify(
    output: OutputFolder,
    *,
    against: VerifyAgainst = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every file, tensor and bit of an output; exit 1 if anything is off."""
    del debug
    from rsq_stream.output.verify import verify as check

    found = check(output, open_checkpoint(against) if against else None)
    if as_json:
        say_json(asdict(found))
    elif not quiet:
        _report(output, found.files, found.bytes, found.tensors, found.weight_errors)
    for problem in found.problems:
        remark("error", problem)
    if found.problems:
        raise typer.Exit(1)


def _report(
    output: Path, files: int, size: int, tensors: int, errors: dict[str, float]
) -> None:
    checked = f"{files} ({exact_size(size)})"
    say(facts({"output": str(output), "files": checked, "tensors": str(tensors)}))
    if errors:
        worst = sorted(errors, key=lambda name: -errors[name])[:_WORST]
        say("\nlargest |W - Q|^2 / |W|^2:")
        say(table(("linear", "error"), [(n, f"{errors[n]:.4f}") for n in worst]))
