"""From raw scores to token weights, one per token of a sequence, shared by a block.

In this order, as in the reference code of RSQ (arXiv 2503.01820): direction, what
queries can see a token, transform, the affine map onto [min, max] with its bounds, then
a mask or bins, then mean 1 per sequence:
r = min + (max - min) (s - low) / (high - low), w = r^p / mean r^p.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How raw scores become weights."""

    minimum: float = 0.0
    maximum: float = 1.0
    power: int = 1
    """1 weighs H by r, as the reference code does; 2 by r^2, as the paper prints it."""
    visible: str = "no"
    """Divide a score by the queries that see its token (``linear``), by their square
    root (``root``), or not (``no``): early tokens are seen by more."""
    transform: str = "no"
    """``log`` or ``rank`` take the scale of the largest scores away; or ``no``."""
    quantile: float = 0.0
    """The quantiles q and 1 - q are low and high in place of least and most."""
    skip: int = 0
    """So many of the largest scores do not count for ``high`` (attention sinks)."""
    mask: float = 0.0
    """This share of the tokens, the lowest, weighs 0, all others 1."""
    truncate: float = 0.0
    """This share of the tokens, the lowest, weighs 0, all others what they did."""
    bins: int = 0
    """So many equal shares of the tokens get weights evenly from min to max."""
    reverse: bool = False
    exact: bool = False
    """Do not round to bf16."""

    def weights(self, score_BT: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return weights of mean 1 per sequence, rounded to bf16 unless exact."""
        score_BT = -score_BT if self.reverse else score_BT
        score_BT = transformed(seen(score_BT, self.visible), self.transform)
        spread_BT = affine(
            score_BT,
            self.minimum,
            self.maximum,
            quantile=self.quantile,
            skip=self.skip,
        )
        if self.mask > 0:
            spread_BT = (~lowest(score_BT, self.mask)).to(spread_BT)
        elif self.truncate > 0:
            spread_BT = spread_BT.masked_fill(lowest(score_BT, self.truncate), 0.0)
        elif self.bins > 0:
            spread_BT = binned(score_BT, self.bins, self.minimum, self.maximum)
        weight_BT = mean_one(spread_BT.pow(self.power))
        return weight_BT if self.exact else rounded(weight_BT)


def seen(score_BT: Float[Tensor, "B T"], visible: str) -> Float[Tensor, "B T"]:
    """Divide scores by the queries that see each token, T - j, or by the root."""
    if visible == "no":
        return score_BT
    tokens = score_BT.shape[1]
    queries_T = torch.arange(tokens, 0, -1, device=score_BT.device).to(score_BT)
    return score_BT / (queries_T if visible == "linear" else queries_T.sqrt())


def transformed(score_BT: Float[Tensor, "B T"], transform: str) -> Float[Tensor, "B T"]:
    """Return scores whose largest do not decide the scale of all.

    ``log`` is that of the distance from the least score, plus the median distance, so
    that it is defined for any scores; ``rank`` counts the smaller scores, and the
    earlier equal ones.
    """
    if transform == "rank":
        order_BT = score_BT.argsort(dim=1, stable=True)
        return order_BT.argsort(dim=1).to(score_BT)
    if transform == "log":
        above_BT = score_BT - score_BT.amin(1, keepdim=True)
        # The lower median by a sort: CUDA has no deterministic median.
        middle = (score_BT.shape[1] - 1) // 2
        middle_B1 = above_BT.sort(dim=1).values[:, middle, None]
        tiny = torch.finfo(score_BT.dtype).tiny
        return (above_BT + middle_B1.clamp(min=tiny)).log()
    return score_BT


def affine(
    score_BT: Float[Tensor, "B T"],
    minimum: float,
    maximum: float,
    *,
    quantile: float = 0.0,
    skip: int = 0,
) -> Float[Tensor, "B T"]:
    """Map each sequence's scores linearly onto [minimum, maximum].

    What lies outside of the bounds is clamped. A sequence whose bounds are equal has no
    more and less important tokens: each gets the maximum.
    """
    sorted_BT = score_BT.sort(dim=1).values
    last = score_BT.shape[1] - 1
    # Quantiles are entries, not mixtures of two: the same on every device.
    low = round(quantile * last)
    high = max(last - low - min(skip, last), low)
    low_B1, high_B1 = sorted_BT[:, low, None], sorted_BT[:, high, None]
    span_B1 = high_B1 - low_B1
    share_BT = torch.where(span_B1 > 0, (score_BT - low_B1) / span_B1, 1.0)
    return minimum + (maximum - minimum) * share_BT.clamp(0, 1)


def lowest(score_BT: Float[Tensor, "B T"], share: float) -> Tensor:
    """Mark the lowest tokens of each sequence, round(share T) of them, never all."""
    tokens = score_BT.shape[1]
    count = min(round(share * tokens), tokens - 1)
    return transformed(score_BT, "rank") < count


def binned(
    score_BT: Float[Tensor, "B T"], bins: int, minimum: float, maximum: float
) -> Float[Tensor, "B T"]:
    """Weigh tokens, by rank, with ``bins`` weights evenly from minimum to maximum."""
    rank_BT = transformed(score_BT, "rank")
    bin_BT = (rank_BT * bins / score_BT.shape[1]).floor().clamp(max=bins - 1)
    return minimum + (maximum - minimum) * bin_BT / max(1, bins - 1)


def mean_one(weight_BT: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Scale each sequence to mean 1, so that all contribute equally to H.

    A sequence whose tokens all weigh 0 keeps them.
    """
    mean_B1 = weight_BT.mean(dim=1, keepdim=True)
    return weight_BT / torch.where(mean_B1 > 0, mean_B1, 1.0)


def rounded(weight_BT: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Round to bf16 once, so that w x has 16 significant bits on every device."""
    return weight_BT.to(torch.bfloat16).float()
