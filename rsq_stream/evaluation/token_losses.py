"""Loss and divergence of tokens, over a vocabulary that comes some rows at a time.

With logits z and the largest of them so far, m, a token keeps m and sum exp(z - m); its
loss is m + log(sum) - z[target]. For KL(p || q) it also keeps
sum exp(z_p - m_p) (z_p - z_q). Logits are fp32, sums fp64.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class TokenLosses:
    """What is known of the predicted tokens of a unit, by model: M of them."""

    def __init__(self, target_L: Int[Tensor, "L"], models: int) -> None:
        size, place = (models, len(target_L)), target_L.device
        self.target_L = target_L
        self._top_ML = torch.full(size, -torch.inf, device=place)
        self._total_ML = torch.zeros(size, dtype=torch.float64, device=place)
        self._target_ML = torch.zeros(size, dtype=torch.float64, device=place)
        self._apart_L = torch.zeros(size[1], dtype=torch.float64, device=place)

    def take_in(
        self, rows: slice, first: int, logits: Sequence[Float[Tensor, "R V"]]
    ) -> None:
        """Take in the logits of some tokens for the vocabulary from ``first`` on."""
        place_R = self.target_L[rows] - first
        inside_R = (place_R >= 0) & (place_R < logits[0].shape[1])
        for model, logit_RV in enumerate(logits):
            before_R = self._top_ML[model, rows]
            top_R = torch.maximum(before_R, logit_RV.amax(dim=1))
            fade_R = (before_R - top_R).double().exp()
            share_RV = (logit_RV - top_R[:, None]).exp()
            total_R = share_RV.sum(dim=1, dtype=torch.float64)
            self._total_ML[model, rows] = self._total_ML[model, rows] * fade_R + total_R
            self._top_ML[model, rows] = top_R
            found_R = logit_RV.gather(
                1, place_R.clamp(0, logit_RV.shape[1] - 1)[:, None]
            )
            self._target_ML[model, rows] += torch.where(inside_R, found_R[:, 0], 0)
            if model == 1:
                share_RV *= logit_RV - logits[0]
                apart_R = share_RV.sum(dim=1, dtype=torch.float64)
                self._apart_L[rows] = self._apart_L[rows] * fade_R + apart_R

    def sums(self) -> tuple[list[float], float]:
        """Return each model's loss, and KL(second || first), summed over the tokens."""
        log_ML = self._top_ML.double() + self._total_ML.log()
        losses = (log_ML - self._target_ML).sum(dim=1).tolist()
        if len(losses) < 2:
            return losses, 0.0
        apart_L = self._apart_L / self._total_ML[1] - log_ML[1] + log_ML[0]
        return losses, float(apart_L.sum())
