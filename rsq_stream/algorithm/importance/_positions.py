"""Weights by place, shared by the strategies that keep ranges of tokens."""

import torch
from jaxtyping import Float
from torch import Tensor


def chosen_tokens(
    sequences: int,
    tokens: int,
    kept: list[tuple[int, int]],
    device: torch.device | None = None,
) -> Float[Tensor, "B T"]:
    """Weigh the tokens of some ranges 1 and the others 0 (First-N and its kin)."""
    weight_T = torch.zeros(tokens, device=device)
    for start, end in kept:
        weight_T[start:end] = 1.0
    return weight_T.expand(sequences, tokens).contiguous()
