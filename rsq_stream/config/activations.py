"""How a served model rounds its activations: inputs of linears, and cached K and V.

The fields are a plan's, for a run that calibrates on what the served model sees, and
those of ``ActivationRounding``, what ``eval`` simulates.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsq_stream.config.schemes import UNQUANTIZED
from rsq_stream.errors import UsageError, require

_PARTS = ("activation", "kv")
_WHOLE = -1
"""A group size: all inputs of a token share a scale."""


@dataclass(frozen=True, kw_only=True)
class ActivationFields:
    """Bits and grids of rounded activations (``algorithm/activation_rounding.py``).

    Scales are found for each token when it comes: nothing is calibrated.
    """

    __slots__ = ()

    activation_bits: int = UNQUANTIZED
    """Of the inputs of every linear of a block, 2 to 8; 16 leaves them. The head's
    input always stays."""
    activation_group_size: int = _WHOLE
    """Inputs of a token that share a scale, -1 for all of them."""
    activation_symmetric: bool = True
    activation_clip: float = 1.0
    """Share of a token's range that the levels span."""
    kv_bits: int = UNQUANTIZED
    """Of K and V, with a scale for each token and KV head; 16 leaves them. K is
    rotated before, in each head, and q with it."""
    kv_symmetric: bool = True
    kv_clip: float = 1.0

    def check_activations(self) -> None:
        """Refuse what is out of bounds, or has no effect.

        Raises
        ------
        UsageError
            The first such field, by its option.
        """
        for part in _PARTS:
            bits, clip = getattr(self, f"{part}_bits"), getattr(self, f"{part}_clip")
            sound = 2 <= bits <= 8 or bits == UNQUANTIZED
            require(sound, f"{part}-bits", bits, f"2 to 8, or {UNQUANTIZED} for none")
            require(0 < clip <= 1, f"{part}-clip", clip, "above 0, at most 1")
        size = self.activation_group_size
        require(
            size == _WHOLE or size >= 2, "activation-group-size", size, "-1, 2 or more"
        )
        for name, usual in _defaults().items():
            part = name.partition("_")[0]
            if (
                getattr(self, f"{part}_bits") == UNQUANTIZED
                and getattr(self, name) != usual
            ):
                option = name.replace("_", "-").replace("symmetric", "asymmetric")
                raise UsageError(f"--{option} needs --{part}-bits")

    def require_whole_groups(self, inputs: Mapping[str, int]) -> None:
        """Refuse a group size that does not divide the inputs of a linear.

        Raises
        ------
        UsageError
            With the first such linear and its inputs.
        """
        size = self.activation_group_size
        for linear, width in inputs.items():
            wanted = f"-1 or a divisor of the {width} inputs of {linear}"
            sound = size == _WHOLE or width % size == 0
            require(sound, "activation-group-size", size, wanted)

    @property
    def rounds_activations(self) -> bool:
        """Whether anything is rounded."""
        return self.activation_bits != UNQUANTIZED or self.kv_bits != UNQUANTIZED

    def activations_text(self) -> str:
        """Describe what is rounded, and how; a scale a token where no more is said.

        ``4-bit inputs of linears, symmetric; 4-bit K and V, symmetric, clip 0.95``.
        """
        found = []
        for part, what in (("activation", "inputs of linears"), ("kv", "K and V")):
            bits, clip = getattr(self, f"{part}_bits"), getattr(self, f"{part}_clip")
            if bits == UNQUANTIZED:
                continue
            grid = "symmetric" if getattr(self, f"{part}_symmetric") else "asymmetric"
            text = f"{bits}-bit {what}, {grid}"
            if part == "activation" and self.activation_group_size != _WHOLE:
                text += f", groups of {self.activation_group_size}"
            found.append(text if clip == 1 else f"{text}, clip {clip:g}")
        return "; ".join(found) or "nothing"


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationRounding(ActivationFields):
    """What is simulated when a model is evaluated; by default nothing."""

    def __post_init__(self) -> None:
        self.check_activations()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "ActivationRounding":
        """Take a scheme from a plan's fields; those that it lacks are at their default.

        Raises
        ------
        UsageError
            A field is out of bounds.
        """
        return cls(**{name: fields[name] for name in _defaults() if name in fields})

    def changed(self, given: Mapping[str, Any]) -> "ActivationRounding":
        """Replace the fields that are given, and not None.

        Bits of 16 switch off the other fields of their part as well.

        Raises
        ------
        UsageError
            A field is out of bounds, or has no effect.
        """
        made = {name: value for name, value in given.items() if value is not None}
        off = tuple(part for part in _PARTS if made.get(f"{part}_bits") == UNQUANTIZED)
        usual = {n: value for n, value in _defaults().items() if n.startswith(off)}
        return dataclasses.replace(self, **usual | made)


def _defaults() -> dict[str, Any]:
    """Return all fields at their defaults: nothing is rounded."""
    return {field.name: field.default for field in dataclasses.fields(ActivationFields)}


NOTHING = ActivationRounding()
"""Activations stay as they are computed."""
