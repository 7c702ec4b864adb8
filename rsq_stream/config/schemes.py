"""How each linear is stored: with the plan's bits and group size, or its own.

A plan keeps linears that have their own as sorted lines, ``NAME=BITSgGROUP`` or
``NAME=16``; ``--override`` gives them by pattern (``overrides.py``).
"""

from dataclasses import dataclass

KEPT = 16
"""Bits of a linear that stays as the source has it."""
HEAD_LINEAR = "lm_head"
"""The head by its name as a linear: quantized only where it is named."""
GROUP_SIZES = (32, 64, 128, -1)
INTEGER, NORMAL_FLOAT, LATTICE = GRIDS = ("integer", "nf", "e8p")
"""What codes stand for: whole numbers, quantiles of a normal, points of E8P."""
GRID_NAMES = {NORMAL_FLOAT: "NormalFloat", LATTICE: "E8P lattice"}
"""The grids that are not integers, in words."""
COMPRESSED_TENSORS, GRID_FORMAT = "compressed-tensors", "rsq-stream-grid"
"""The formats of an output: of integers, and of the other grids, which is our own."""
LATTICE_WIDTH = 8
"""Inputs that share a codeword of the lattice."""


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized."""

    bits: int
    group_size: int
    """Inputs per scale, -1 for the whole row."""
    symmetric: bool
    grid: str = INTEGER
    """One of ``GRIDS``."""

    def groups(self, inputs: int) -> int:
        """Scales per row."""
        return 1 if self.group_size == -1 else inputs // self.group_size
