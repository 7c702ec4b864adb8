"""The attention that a token receives (AttnCon)."""

from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.importance.base import Seen, Strategy


def score(seen: Seen) -> Float[Tensor, "B T"]:
    """Score tokens by the attention that they receive in this block."""
    assert seen.attention_BT is not None
    return seen.attention_BT


STRATEGY = Strategy(help="attention received", score=score, needs=("attention",))
