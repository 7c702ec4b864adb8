"""``rsq-stream doctor``: what this machine can do, measured and checked."""

from dataclasses import asdict
from pathlib import Path

import typer

from ..display.text import say, say_json
from ..doctor.machine import (
    check_clip_search,
    check_sweep,
    checked,
    disk_speed,
    kernels,
    machine,
    versions,
)
from ..options.common import Debug, Json, ProbeFolder, Quiet


def doctor(
    *,
    work_dir: ProbeFolder = Path(),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check what this machine can do: kernels, disk, devices, versions."""
    del quiet, debug
    findings = [
        *versions(),
        *machine(),
        checked("disk", lambda: disk_speed(work_dir)),
        checked("sweep against its twin", check_sweep),
        checked("clip search against its twin", check_clip_search),
        *kernels(),
    ]
    failed = any(finding.ok is False for finding in findings)
    if as_json:
        say_json({"ok": not failed, "findings": [asdict(made) for made in findings]})
    else:
        word = {None: "", True: "ok", False: "FAILED"}
        say(_left(tuple((made.name, word[made.ok], made.found) for made in findings)))
    if failed:
        raise typer.Exit(1)


def _left(rows: tuple[tuple[str, str, str], ...]) -> str:
    names = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{names}}  {ok:<6}  {found}" for name, ok, found in rows)
