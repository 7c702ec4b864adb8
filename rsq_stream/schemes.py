"""How each linear is stored: with the plan's bits and group size, or its own.

A plan keeps linears that have their own as sorted lines, ``NAME=BITSgGROUP`` or
``NAME=16``; ``--override`` gives them by pattern. The last pattern that fits wins.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rsq_stream.errors import UsageError

KEPT = 16
"""Bits of a linear that stays as the source has it."""
HEAD_LINEAR = "lm_head"
"""The head by its name as a linear: quantized only where it is named."""
GROUP_SIZES = (32, 64, 128, -1)

_LINE = re.compile(r"(?P<name>[^=]+)=(?P<bits>\d{1,2})(g(?P<group>-1|\d{1,3}))?")
_PATTERN = re.compile(r"(?P<glob>[^@]+)(@(?P<first>\d{1,4})(-(?P<last>\d{1,4}))?)?")


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized."""

    bits: int
    group_size: int
    """Inputs per scale, -1 for the whole row."""
    symmetric: bool

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


def resolve(
    lines: Iterable[str], names: Mapping[str, int | None]
) -> dict[str, Override]:
    """Give the overrides by full name that patterns stand for.

    A pattern is a glob of the linear's full name, or of its end; ``@3`` and ``@0-3``
    keep to blocks. ``names`` gives each linear's block, None for the head, which is
    meant only by its own name.

    Raises
    ------
    UsageError
        A line is malformed, or fits no linear.
    """
    chosen: dict[str, Override] = {}
    for line in lines:
        pattern, override = parse_override(line)
        fitting = [name for name in names if _fits(pattern, name, names[name])]
        if not fitting:
            some = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise UsageError(
                f"--override {line}: no linear of this model fits {pattern}; there are"
                f" {some}"
            )
        chosen.update(dict.fromkeys(fitting, override))
    return chosen


def _fits(pattern: str, name: str, block: int | None) -> bool:
    if block is None:  # the head is meant only by its name
        return pattern == name
    found = _PATTERN.fullmatch(pattern)
    if not found:
        return False
    if found["first"] is not None:
        first = int(found["first"])
        last = int(found["last"]) if found["last"] else first
        if not first <= block <= last:
            return False
    globs = (found["glob"], f"*.{found['glob']}")
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
