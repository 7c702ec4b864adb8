"""How each linear is stored: with the plan's bits and group size, or its own.

A plan keeps linears that have their own as sorted lines, ``NAME=BITSgGROUP`` or
``NAME=16``; ``--override`` gives them by pattern (``overrides.py``).
"""

from dataclasses import dataclass

UNQUANTIZED = 16
"""Bits of a linear that stays as the source has it."""
LM_HEAD_LINEAR = "lm_head"
"""The head by its name as a linear: quantized only where it is named."""
GROUP_SIZES = (32, 64, 128, -1)
DEFAULT_GRID = "integer"
"""The grid where none is named: all that plans of old could have."""


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized."""

    bits: int
    group_size: int
    """Inputs per scale, -1 for the whole row."""
    symmetric: bool
    grid: str = DEFAULT_GRID
    """A name of ``algorithm/grids``."""

    def groups(self, inputs: int) -> int:
        """Scales per row."""
        return 1 if self.group_size == -1 else inputs // self.group_size
