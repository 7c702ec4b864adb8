"""``rsq-stream verify``: whether an output is, bit for bit, what was written."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..display.text import exact_size, facts, remark, say, say_json, table
from ..options.common import Debug, Json, OutputFolder, Quiet, VerifyAgainst

if TYPE_CHECKING:
    from rsq_stream.output.verify import Verification

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
    from rsq_stream import api

    found = api.verify(output, against=against)
    if as_json:
        say_json(asdict(found))
    elif not quiet:
        _report(output, found)
    for problem in found.problems:
        remark("error", problem)
    if found.problems:
        raise typer.Exit(1)


def _report(output: Path, found: "Verification") -> None:
    files, errors = f"{found.files} ({exact_size(found.bytes)})", found.weight_errors
    rows = {"output": str(output), "files": files, "tensors": str(found.tensors)}
    say(facts(rows))
    if errors:
        worst = sorted(errors, key=lambda name: -errors[name])[:_WORST]
        say("\nlargest |W - Q|^2 / |W|^2:")
        say(table(("linear", "error"), [(n, f"{errors[n]:.4f}") for n in worst]))
