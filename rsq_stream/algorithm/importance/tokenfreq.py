"""Rare tokens first (TokenFreq)."""

from jaxtyping import Float, Int
from torch import Tensor

from rsq_stream.algorithm.importance.base import Seen, Strategy


def rarity(
    token_BT: Int[Tensor, "B T"], count_V: Int[Tensor, "V"]
) -> Float[Tensor, "B T"]:
    """Score tokens by how seldom they are in the calibration set (TokenFreq)."""
    return -count_V[token_BT].float()


def score(seen: Seen) -> Float[Tensor, "B T"]:
    """Score tokens by how seldom they are in the calibration set."""
    assert seen.token_BT is not None
    assert seen.count_V is not None
    return rarity(seen.token_BT, seen.count_V)


STRATEGY = Strategy(help="rare tokens first", score=score, needs=("counts",))
