"""Rare tokens first (TokenFreq)."""

from jaxtyping import Float, Int
from torch import Tensor


def rarity(
    token_BT: Int[Tensor, "B T"], count_V: Int[Tensor, "V"]
) -> Float[Tensor, "B T"]:
    """Score tokens by how seldom they are in the calibration set (TokenFreq)."""
    return -count_V[token_BT].float()
