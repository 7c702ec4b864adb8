"""The form of a strategy, and the tensors that it may look at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from rsq_stream.errors import require

Need = Literal["attention", "block_output", "counts"]
"""Fields of ``Seen`` that are computed only for the strategies that need them."""
Ranges = list[tuple[int, int]]
"""Runs of tokens, each by its start and its end."""


@runtime_checkable
class Options(Protocol):
    """The fields of a plan that a strategy by place may read."""

    @property
    def importance_tokens(self) -> int:
        """How many tokens count, or how many at each end."""

    @property
    def importance_chunks(self) -> str:
        """Which of T equal parts of a window count: ``C,C,.../T``."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One unit of sequences in one block, as a strategy sees it.

    A field that the strategy does not need is None.
    """

    x_BTD: Float[Tensor, "B T D"]
    """The block's input."""
    attention_BT: Float[Tensor, "B T"] | None = None
    """The attention that each token receives, summed over queries and heads."""
    output_BTD: Float[Tensor, "B T D"] | None = None
    """The block's output, with the weights of the source."""
    token_BT: Int[Tensor, "B T"] | None = None
    """The ids of the tokens, on the CPU."""
    count_V: Int[Tensor, "V"] | None = None
    """How often each id is in the calibration set, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How much each token of a sequence counts: by a score, or by its place.

    Scores become weights as the plan has it (``_weighting.py``). By place, the tokens
    in some ranges weigh 1 and all others 0.
    """

    help: str
    """A few words for the table of a plan."""
    score: Callable[[Seen], Float[Tensor, "B T"]] | None = None
    """Score the tokens of a unit: the higher, the more a token counts."""
    needs: tuple[Need, ...] = ()
    """Look-ups of ``score`` beside the block's input: the run computes these alone, and
    the planner counts their memory and time."""
    ranges: Callable[[Options, int], Ranges] | None = None
    """Return the tokens that count, from a plan and the length of a sequence; raise
    UsageError where the plan's options make no ranges."""
    tokens_share: float = 0.0
    """Takes ``--importance-tokens``, by default this share of the window; 0 if not."""
    takes_chunks: bool = False
    """Takes ``--importance-chunks``."""

    def __post_init__(self) -> None:
        if (self.score is None) == (self.ranges is None):
            raise TypeError("a strategy has either a score or ranges")

    @property
    def takes_tokens(self) -> bool:
        """Whether it takes ``--importance-tokens``."""
        return self.tokens_share > 0

    def default_tokens(self, sequence_length: int) -> int:
        """Return the default of ``--importance-tokens``, 0 if it is not taken."""
        if not self.takes_tokens:
            return 0
        return max(1, int(sequence_length * self.tokens_share))

    def require_options(self, options: Options, sequence_length: int) -> None:
        """Refuse the options of a plan that this strategy cannot follow.

        Raises
        ------
        UsageError
            The first such option, by its name.
        """
        if self.takes_tokens:
            require(
                1 <= options.importance_tokens <= sequence_length,
                "importance-tokens",
                options.importance_tokens,
                f"1 to the sequence length ({sequence_length})",
            )
        if self.ranges is not None:
            self.ranges(options, sequence_length)
