"""Plan fields that say how much of earlier layers' error a linear makes up for."""

import functools
from dataclasses import dataclass

from rsq_stream.errors import require


@dataclass(frozen=True, kw_only=True)
class PropagationFields:
    """The second stream, in full precision, and what is done with it."""

    __slots__ = ()

    propagate: float
    """How much of the error of earlier layers a linear's targets make up for; 0 for
    none, and then no full-precision stream is carried."""
    propagate_overrides: tuple[str, ...]
    """Linears with a share of their own, sorted: ``NAME=A``."""
    residual_correction: bool
    """o and down also make up for the error of the residual they are added to."""

    def check_propagation(self) -> None:
        """Refuse shares that are out of bounds.

        Raises
        ------
        UsageError
            With the option, its bounds and what it is.
        """
        _shares(self.propagate_overrides)
        require(0 <= self.propagate <= 1, "propagate", self.propagate, "0 to 1")

    @property
    def streams(self) -> int:
        """Streams of activations: the quantized, and the full-precision one beside."""
        own = _shares(self.propagate_overrides).values()
        return 2 if self.propagate > 0 or any(share > 0 for share in own) else 1

    def propagate_share(self, linear: str) -> float:
        """Return how much of earlier layers' error a linear makes up for."""
        return _shares(self.propagate_overrides).get(linear, self.propagate)


@functools.lru_cache(maxsize=8)
def _shares(overrides: tuple[str, ...]) -> dict[str, float]:
    return dict(parse_share(line) for line in overrides)


def parse_share(line: str) -> tuple[str, float]:
    """Take ``PATTERN=A`` apart.

    Raises
    ------
    UsageError
        A is not a number from 0 to 1.
    """
    pattern, _, text = line.partition("=")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    wanted = "PATTERN=A with A from 0 to 1"
    require(bool(pattern) and 0 <= share <= 1, "propagate-override", line, wanted)
    return pattern, share
