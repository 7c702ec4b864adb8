"""How each linear is stored: with the plan's bits and group size, or its own.

A plan keeps linears that have their own as sorted lines, ``NAME=BITSgGROUP`` or
``NAME=16``; ``--override`` gives them by pattern (``patterns.py``).
"""

import re
from dataclasses import dataclass

from rsq_stream.errors import UsageError

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

_LINE = re.compile(r"(?P<name>[^=]+)=(?P<bits>\d{1,2})(g(?P<group>-1|\d{1,3}))?")


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


@dataclass(frozen=True)
class Override:
    """Bits and group size of its own; of a group size of None, the plan's."""

    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"{self.bits}{group}"


def parse_override(text: str, option: str = "override") -> tuple[str, Override]:
    """Take ``PATTERN=BITS[gGROUP]`` apart.

    Raises
    ------
    UsageError
        It is not of that form, or its numbers are not among those that exist.
    """
    found = _LINE.fullmatch(text)
    bits = int(found["bits"]) if found else 0
    group = int(found["group"]) if found and found["group"] else None
    sound = 2 <= bits <= 8 or (bits == KEPT and group is None)
    if not found or not sound or group not in (None, *GROUP_SIZES):
        raise UsageError(
            f"--{option} must be PATTERN=BITS[gGROUP] with 2 to 8 bits or 16, and a"
            f" group of {', '.join(map(str, GROUP_SIZES))}, such as"
            f' "down_proj=4g64" or "v_proj@0-3=16", not {text}'
        )
    return found["name"], Override(bits, group)
