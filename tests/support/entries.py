"""Toy runs with each entry of a registry: a new entry is in them without a line."""

from typing import Any

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.checkpoint.formats import FORMATS


def grid_settings(name: str) -> dict[str, Any]:
    """Return settings of a toy run with a grid: 3 bits and groups where it has them."""
    grid = GRIDS[name]
    bits = 3 if 3 in grid.bit_widths else min(grid.bit_widths)
    return {"grid": name, "bits": bits, "group_size": 32 if grid.takes_groups else -1}


def format_settings(name: str) -> dict[str, Any]:
    """Return settings of a toy run with a format, of the first grid that it stores."""
    grid = next(grid for grid in GRIDS if FORMATS[name].stores(GRIDS[grid]))
    return grid_settings(grid) | {"output_format": name}
