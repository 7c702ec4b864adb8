"""The norm of a token's activation (ActNorm)."""

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.importance.base import Seen, Strategy


def norm(x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
    """Score tokens by their Euclidean norm (ActNorm)."""
    norm_BT: Tensor = torch.linalg.vector_norm(x_BTD.float(), dim=-1)
    return norm_BT


def score(seen: Seen) -> Float[Tensor, "B T"]:
    """Score tokens by the norm of the block's input."""
    return norm(seen.x_BTD)


STRATEGY = Strategy(help="norm of the block's input", score=score)
