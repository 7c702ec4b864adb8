"""The norm of a token's activation behind the block (ActNorm of the output)."""

from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.importance.actnorm import norm
from rsq_stream.algorithm.importance.base import Seen, Strategy


def score(seen: Seen) -> Float[Tensor, "B T"]:
    """Score tokens by the Euclidean norm of the block's output."""
    assert seen.output_BTD is not None
    return norm(seen.output_BTD)


STRATEGY = Strategy(
    help="norm of the block's output", score=score, needs=("block_output",)
)
