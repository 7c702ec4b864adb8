"""What the pipeline says while it works; the command line renders it.

Every event is frozen data. The library prints nothing by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    """The plan stands and the first block is about to be read."""

    blocks: int
    first_block: int
    """The first block still to do; more than 0 on a resumed run."""
    tokens: int
    """Calibration tokens, expansion included; 0 where none are needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """A stage of a block begins; ``units`` passes follow."""

    block: int
    stage: str
    units: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitsDone:
    """Some units of the present stage went through."""

    block: int
    stage: str
    units: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRecord:
    """What the solver did to one linear; kept in the journal and the output."""

    block: int
    name: str
    """Full name of the linear, without ``.weight``."""
    bits: int
    group_size: int
    """Inputs per scale; -1 is one scale a row."""
    relative_error: float
    """Weighted output energy lost, ``tr(E H E^T) / tr(W H W^T)``; for
    rounding without calibration the same with H = I."""
    rounding_error: float
    """The same for rounding to nearest with the solver's own scales."""
    kept_rounding: bool
    """The solver's loss was above rounding's, so the rounded codes were kept."""
    damping: float
    """Damping finally used, as a share of the Hessian's mean diagonal."""
    damping_attempts: int
    """Factorisations tried; more than 1 where damping had to grow."""
    dead_inputs: int
    """Inputs that no calibration token ever moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFinished:
    """A block is solved, written, journalled."""

    block: int
    seconds: float
    records: tuple[LinearRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFinished:
    """An output shard has its final name."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """Something the user should know, in one line."""

    text: str
    is_warning: bool = False
    """Whether something may go wrong because of it."""


Event = RunStarted | StageStarted | UnitsDone | BlockFinished | ShardFinished | Notice
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing: the default of every function that takes a listener."""
