"""What the solver asks of a grid."""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

CLIP_STEP = 0.01
"""Candidate scales shrink by 1 % of the full range, as in the reference code."""


@functools.cache
def shrinking_shares(steps: int, device: torch.device) -> Float[Tensor, "P"]:
    """Give the candidates' shares of a full range: 1.00, 0.99, ..."""
    return 1 - CLIP_STEP * torch.arange(steps, dtype=torch.float32, device=device)


def picked(
    scale_RP: Float[Tensor, "R P"], best_R: Int[Tensor, "R"], *, mirrored: bool
) -> Float[Tensor, "R"]:
    """Give each row's best candidate, p of ``best_R`` itself and -1 - p its mirror."""
    if not mirrored:
        return scale_RP.gather(1, best_R[:, None])[:, 0]
    index_R = torch.where(best_R < 0, -1 - best_R, best_R)
    scale_R = scale_RP.gather(1, index_R[:, None])[:, 0]
    return torch.where(best_R < 0, -scale_R, scale_R)
