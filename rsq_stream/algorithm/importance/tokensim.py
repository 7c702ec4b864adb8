"""Distance from the other tokens of the sequence (TokenSim)."""

from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.importance.base import Seen, Strategy


def dissimilarity(x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
    """Score tokens by their mean squared distance from all others (TokenSim).

    mean over k of |x_j - x_k|^2 = |x_j - m|^2 + mean over k of |x_k - m|^2, m the mean
    of the sequence: no T x T product, and no cancellation.
    """
    x_BTD = x_BTD.float()
    square_BT = (x_BTD - x_BTD.mean(1, keepdim=True)).square().sum(-1)
    return square_BT + square_BT.mean(1, keepdim=True)


def score(seen: Seen) -> Float[Tensor, "B T"]:
    """Score tokens by their distance from the others in the block's input."""
    return dissimilarity(seen.x_BTD)


STRATEGY = Strategy(help="distance from all other tokens", score=score)
