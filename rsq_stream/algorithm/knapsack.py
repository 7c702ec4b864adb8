"""Bits for each unit, so that the sum of costs is least and the sizes fit.

A multiple-choice knapsack, solved exactly by dynamic programming over the sizes in
their greatest common divisor; where that gives too many cells, in coarser ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LARGEST_CELLS = 200_000


@dataclass(frozen=True)
class Item:
    """What is given bits as one: its size and its cost for each option."""

    sizes: tuple[int, ...]
    """Rising, in any whole unit that the budget has too."""
    costs: tuple[float, ...]


def allocate(units: Sequence[Item], budget: int) -> list[int] | None:
    """Return the option of each unit with the least sum of costs, sizes within budget.

    None where not even the smallest options fit. Of equal sums the smaller sizes win.
    """
    least = [unit.sizes[0] for unit in units]
    spare = budget - sum(least)
    if spare < 0:
        return None
    steps = [size - unit.sizes[0] for unit in units for size in unit.sizes[1:]]
    if not steps:
        return [0] * len(units)
    most = sum(unit.sizes[-1] for unit in units) - sum(least)
    cell = math.gcd(*steps)
    if min(spare, most) // cell >= _LARGEST_CELLS:
        cell = -(-min(spare, most) // _LARGEST_CELLS)
    # Rounded up, so that what fits in cells fits.
    extra = [
        [-(-(size - unit.sizes[0]) // cell) for size in unit.sizes] for unit in units
    ]
    cells = min(spare // cell, sum(row[-1] for row in extra))
    best = np.full(cells + 1, 0.0)
    chosen = np.zeros((len(units), cells + 1), dtype=np.int8)
    for number, unit in enumerate(units):
        total = np.full(cells + 1, np.inf)
        for option, (step, cost) in enumerate(
            zip(extra[number], unit.costs, strict=True)
        ):
            if step > cells:
                continue
            candidate = np.full(cells + 1, np.inf)
            candidate[step:] = best[: cells + 1 - step] + cost
            better = candidate < total
            total[better] = candidate[better]
            chosen[number, better] = option
        best = total
    at, options = int(np.argmin(best)), []
    for number in range(len(units) - 1, -1, -1):
        option = int(chosen[number, at])
        options.append(option)
        at -= extra[number][option]
    return options[::-1]
