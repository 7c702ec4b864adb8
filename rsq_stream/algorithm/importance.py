"""Token importance: one weight per token of a sequence, shared by a block's linears.

A strategy is a small pure function from what is known of the tokens to a raw
score ``[B, T]``; ``token_weights`` maps scores to weights with mean 1 per
sequence (RSQ, arXiv 2503.01820, section 4; facts in the reference code:
r = min + (max - min) (s - min s) / (max s - min s), w = r / mean r).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def attention_concentration(
    column_sums_BT: Float[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Score tokens by the attention they receive, over heads and queries."""
    return column_sums_BT


def affine(
    score_BT: Float[Tensor, "B T"], minimum: float, maximum: float
) -> Float[Tensor, "B T"]:
    """Map each sequence's scores linearly onto [minimum, maximum].

    A sequence whose scores are all equal has no more and less important tokens:
    each gets the maximum.
    """
    low_B1 = score_BT.amin(dim=1, keepdim=True)
    span_B1 = score_BT.amax(dim=1, keepdim=True) - low_B1
    share_BT = torch.where(span_B1 > 0, (score_BT - low_B1) / span_B1, 1.0)
    return minimum + (maximum - minimum) * share_BT


def first_tokens(sequences: int, tokens: int, count: int) -> Float[Tensor, "B T"]:
    """Weigh the first ``count`` tokens 1 and the others 0 (First-N of the paper)."""
    weight_T = (torch.arange(tokens) < count).float()
    return weight_T.expand(sequences, tokens).contiguous()


def mean_one(weight_BT: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Scale each sequence to mean 1, so that all contribute equally to H."""
    return weight_BT / weight_BT.mean(dim=1, keepdim=True)


def rounded(weight_BT: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Round to bf16 once, so that w x has 16 significant bits on every device."""
    return weight_BT.to(torch.bfloat16).float()
