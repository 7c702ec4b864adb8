"""The options of ``quantize`` by the name that a file gives them.

A name is the long flag without its dashes: ``group-size = 64``, ``refit = false``. The
flags themselves are asked, so a new option needs nothing here.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
import typer.main

from .quantize_options import QuantizeOptions, takes_options

_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
}


@dataclass(frozen=True, kw_only=True)
class JobOption:
    """An option of ``quantize`` as a file names it."""

    name: str
    field: str
    """Of ``QuantizeOptions``."""
    kind: type
    """``int``, ``float``, ``bool`` or ``str``; of one value, where there are many."""
    many: bool
    """It may be repeated: a list of values."""
    negated: bool
    """The off side of a switch: ``no-refit``."""

    @property
    def wanted(self) -> str:
        """What a value may be, in words."""
        one = _KINDS[self.kind]
        return f"{one} or a list of them" if self.many else one

    def taken(self, value: object) -> Any:
        """Return the value as the field of ``QuantizeOptions`` has it.

        Raises
        ------
        TypeError
            It is of another type than ``wanted`` says.
        """
        if self.many:
            values = value if isinstance(value, list) else [value]
            return [as_kind(self.kind, one) for one in values]
        found = as_kind(self.kind, value)
        return not found if self.negated else found


def as_kind(kind: type, value: object) -> Any:
    """Return a value read from a file as one of a kind; ``2`` will do for a float.

    Raises
    ------
    TypeError
        It is of another type: neither ``"2"`` nor ``true`` is a number.
    """
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(_KINDS[kind])
    return value


@functools.cache
def job_options() -> dict[str, JobOption]:
    """Return every option that is a field of ``QuantizeOptions``, by its name."""

    def command(*, options: QuantizeOptions) -> None:
        del options

    app = typer.Typer(add_completion=False)
    app.command()(takes_options(command))
    hints = get_type_hints(QuantizeOptions)
    found = {}
    for parameter in typer.main.get_command(app).params:
        if parameter.name not in hints:
            continue
        kind, many = _kind(hints[parameter.name])
        sides = ((parameter.opts, False), (parameter.secondary_opts, True))
        for flags, negated in sides:
            for flag in flags:
                name = flag.removeprefix("--")
                found[name] = JobOption(
                    name=name,
                    field=parameter.name,
                    kind=kind,
                    many=many,
                    negated=negated,
                )
    return found


def _kind(hint: Any) -> tuple[type, bool]:
    """Take ``list[str] | None`` apart: the type of a value, and whether many."""
    if get_origin(hint) in (Union, types.UnionType):
        [hint] = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    return (hint if hint in _KINDS else str), False  # a path is written as a string
