"""The table of a sweep: a row per setting, mean and deviation over its seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..display.text import table

HEAD = ("run", "seeds", "perplexity", "deviation", "bits/weight", "seconds")
MEANING = """\
Perplexity: mean and sample standard deviation (n - 1) over the seeds; "-" for one seed.
Seconds: mean time that quantizing took, without the evaluation."""
_NONE = "-"


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One row of the table; None for what is not there."""

    name: str
    seeds: tuple[int, ...]
    """Those that are finished."""
    wanted_seeds: int
    perplexity: float | None
    """Mean over the seeds."""
    deviation: float | None
    """Sample standard deviation, with n - 1; None for one seed."""
    bits_per_weight: float | None
    """Mean: with ``--bpw`` the bits may differ by seed."""
    seconds: float | None
    """Mean."""


def sweep_row(
    name: str, wanted_seeds: int, results: Mapping[int, Mapping[str, Any]]
) -> SweepRow:
    """Compute one row of the table from the results by seed."""
    values = [float(found["perplexity"]) for found in results.values()]
    several = len(values) > 1 and all(map(math.isfinite, values))
    return SweepRow(
        name=name,
        seeds=tuple(results),
        wanted_seeds=wanted_seeds,
        perplexity=_mean(values),
        deviation=statistics.stdev(values) if several else None,
        bits_per_weight=_mean([found["bits_per_weight"] for found in results.values()]),
        seconds=_mean([found["seconds"] for found in results.values()]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def as_table(lines: Sequence[SweepRow]) -> str:
    """Write the lines side by side."""
    return table(HEAD, map(_cells, lines))


def _cells(line: SweepRow) -> tuple[str, ...]:
    seeds = str(len(line.seeds))
    if len(line.seeds) != line.wanted_seeds:
        seeds += f" of {line.wanted_seeds}"
    return (
        line.name,
        seeds,
        _number(line.perplexity, 3),
        _number(line.deviation, 3),
        _number(line.bits_per_weight, 2),
        _number(line.seconds, 1),
    )


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"
