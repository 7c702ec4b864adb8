"""Options by pattern: ``PATTERN=VALUE`` for some linears; the last that fits wins.

A pattern is a glob of the linear's full name, or of its end; ``@3`` and ``@0-3`` keep
to blocks. The head is meant only by its own name.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from rsq_stream.config.schemes import GROUP_SIZES, UNQUANTIZED
from rsq_stream.errors import UsageError

_LINE = re.compile(r"(?P<name>[^=]+)=(?P<bits>\d{1,2})(g(?P<group>-1|\d{1,3}))?")


Value = TypeVar("Value")

_PATTERN = re.compile(r"(?P<glob>[^@]+)(@(?P<first>\d{1,4})(-(?P<last>\d{1,4}))?)?")


def resolve(
    option: str,
    given: Iterable[tuple[str, Value]],
    names: Mapping[str, int | None],
) -> dict[str, Value]:
    """Return the value of each linear, by full name, that some pattern fits.

    ``names`` gives each linear's block, None for the head.

    Raises
    ------
    UsageError
        A pattern fits no linear.
    """
    chosen: dict[str, Value] = {}
    for pattern, value in given:
        fitting = [name for name in names if _fits(pattern, name, names[name])]
        if not fitting:
            some = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise UsageError(
                f"--{option} {pattern}={value}: no linear of this model fits {pattern};"
                f" there are {some}"
            )
        chosen.update(dict.fromkeys(fitting, value))
    return chosen


def _fits(pattern: str, name: str, block: int | None) -> bool:
    if block is None:
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
    sound = 2 <= bits <= 8 or (bits == UNQUANTIZED and group is None)
    if not found or not sound or group not in (None, *GROUP_SIZES):
        raise UsageError(
            f"--{option} must be PATTERN=BITS[gGROUP] with 2 to 8 bits or 16, and a"
            f" group of {', '.join(map(str, GROUP_SIZES))}, such as"
            f' "down_proj=4g64" or "v_proj@0-3=16", not {text}'
        )
    return found["name"], Override(bits, group)
