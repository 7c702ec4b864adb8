"""What goes with ``--grid nf`` and ``--grid e8p``, and what does not."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from rsq_stream.config.overrides import Override
from rsq_stream.config.schemes import GRIDS, INTEGER, KEPT, LATTICE, LATTICE_WIDTH
from rsq_stream.errors import UsageError, one_of, require


@runtime_checkable
class _Plan(Protocol):
    """What of a plan is looked at."""

    @property
    def grid(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def signed_scales(self) -> bool: ...
    @property
    def act_order(self) -> bool: ...
    @property
    def clip_exponent(self) -> float: ...
    @property
    def tile_columns(self) -> int: ...


def check_grid(plan: _Plan, own: Iterable[Override]) -> None:
    """Refuse what a plan's grid cannot do; ``own`` is what linears have of their own.

    Raises
    ------
    UsageError
        With the option, what it must be and what it is.
    """
    require(plan.grid in GRIDS, "grid", plan.grid, one_of(GRIDS))
    if plan.grid == INTEGER:
        return
    option = f"with --grid {plan.grid}"
    if plan.method == "rotate":
        raise UsageError("--method rotate quantizes nothing: leave --grid out")
    if not plan.symmetric:
        raise UsageError(f"--asymmetric: there are no zero points {option}")
    if plan.grid != LATTICE:
        return
    require(plan.bits == 2, "bits", plan.bits, f"2 {option}")
    require(plan.group_size == -1, "group-size", plan.group_size, f"-1 {option}")
    require(not plan.signed_scales, "signed-scales", "on", f"off {option}")
    require(not plan.act_order, "act-order", "on", f"off {option}")
    usual = plan.clip_exponent == 2
    require(usual, "clip-exponent", plan.clip_exponent, f"2 {option}")
    kept = all(made.bits == KEPT for made in own)
    require(kept, "override", "other bits", f"PATTERN=16 {option}")
    if plan.tile_columns % LATTICE_WIDTH:
        raise UsageError(
            f"tiles must be a multiple of {LATTICE_WIDTH} columns {option}, not"
            f" {plan.tile_columns}"
        )
