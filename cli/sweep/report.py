"""What a sweep shows at its end, or before it begins: the table, the list of runs."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rsq_stream.errors import RsqError

from ..display.text import say, say_json, table
from .folder import SweepFolder
from .runs import Row, SweepRun
from .table import MEANING, SweepRow, as_table, sweep_row


def list_runs(folder: SweepFolder, runs: Sequence[SweepRun], *, as_json: bool) -> None:
    """Show the runs and where each stands."""
    listed = [
        {
            "name": run.name,
            "seed": run.seed,
            "state": folder.state(run.key),
        }
        for run in runs
    ]
    if as_json:
        say_json({"folder": str(folder.path), "runs": listed})
        return
    cells = [(str(r["name"]), str(r["seed"]), str(r["state"])) for r in listed]
    say(table(("run", "seed", "state"), cells))
    counts = Counter(str(run["state"]) for run in listed)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    say(f"\n{len(listed)} runs: {states}; folder {folder.path}")


def report(
    folder: SweepFolder,
    rows: Sequence[Row],
    runs: Sequence[SweepRun],
    failures: Mapping[str, str],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show the table.

    Raises
    ------
    RsqError
        Some run failed.
    """
    results = {run.key: folder.result(run.key) for run in runs}
    lines = []
    for row in rows:
        wanted = [run for run in runs if run.name == row.name]
        own = {
            run.seed: found for run in wanted if (found := results[run.key]) is not None
        }
        lines.append((row, sweep_row(row.name, len(wanted), own), own))
    if as_json:
        say_json(
            {
                "folder": str(folder.path),
                "rows": [_as_object(*line) for line in lines],
                "failures": [
                    {"name": run.name, "seed": run.seed, "error": failures[run.key]}
                    for run in runs
                    if run.key in failures
                ],
            }
        )
    else:
        say(as_table([line for _, line, _ in lines]))
        if not quiet:
            say(f"\n{MEANING}")
    if failures:
        raise RsqError(
            f"{len(failures)} of {len(results)} runs failed, as said above; the same"
            " command tries them again"
        )


def _as_object(
    row: Row, line: SweepRow, own: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    return {
        **dataclasses.asdict(line),
        "options": row.options,
        "runs": list(own.values()),
    }
