"""How little the block changes a token (ActDiff)."""

from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.importance.actnorm import norm


def steadiness(
    x_BTD: Float[Tensor, "B T D"], output_BTD: Float[Tensor, "B T D"]
) -> Float[Tensor, "B T"]:
    """Score tokens by how little the block changes them (ActDiff)."""
    return -norm(output_BTD.float() - x_BTD.float())
