"""Toy runs with each entry of a registry: a new entry is in them without a line."""

from collections.abc import Collection
from itertools import cycle, islice
from typing import Any, TypeVar

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.model.families import FAMILIES

Case = TypeVar("Case")


def grid_settings(name: str) -> dict[str, Any]:
    """Return settings of a toy run with a grid: 3 bits and groups where it has them."""
    grid = GRIDS[name]
    bits = 3 if 3 in grid.bit_widths else min(grid.bit_widths)
    return {"grid": name, "bits": bits, "group_size": 32 if grid.takes_groups else -1}


def format_settings(name: str) -> dict[str, Any]:
    """Return settings of a toy run with a format, of the first grid that it stores."""
    grid = next(grid for grid in GRIDS if FORMATS[name].stores(GRIDS[grid]))
    return grid_settings(grid) | {"output_format": name}


def family_config(name: str) -> dict[str, Any]:
    """Return what a family's toy has in its config.json beyond the usual sizes.

    The toy has all the biases that the family knows. Its heads are narrow where they
    would be as wide as a real model's, and do not add up to its width then.
    """
    family = FAMILIES[name]
    heads = {} if family.head_width_default is None else {"head_dim": 24}
    # Some families name a padding token that lies outside a toy's vocabulary.
    return heads | {"pad_token_id": None} | dict.fromkeys(family.bias_options, True)


def each_with(
    names: Collection[str], cases: Collection[Case]
) -> list[tuple[str, Case]]:
    """Pair each name with a case and each case with a name, in as few pairs as do."""
    pairs = zip(cycle(names), cycle(cases), strict=True)
    return list(islice(pairs, max(len(names), len(cases))))
