"""How little the block changes a token (ActDiff)."""

from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.importance.actnorm import norm
from rsq_stream.algorithm.importance.base import Seen, Strategy


def steadiness(
    x_BTD: Float[Tensor, "B T D"], output_BTD: Float[Tensor, "B T D"]
) -> Float[Tensor, "B T"]:
    """Score tokens by how little the block changes them (ActDiff)."""
    return -norm(output_BTD.float() - x_BTD.float())


def score(seen: Seen) -> Float[Tensor, "B T"]:
    """Score tokens by how little this block changes them."""
    assert seen.output_BTD is not None
    return steadiness(seen.x_BTD, seen.output_BTD)


STRATEGY = Strategy(
    help="tokens that the block changes least", score=score, needs=("block_output",)
)
