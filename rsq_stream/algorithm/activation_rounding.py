"""Activations as a low-precision kernel would see them: rounded, and back.

Scales are dynamic, one per token, or per group of a token's values: nothing is known
of the token before it comes. With b bits and a clip ratio c,

    symmetric   s = c max|x| / (2**(b-1) - 1)      levels s (-2**(b-1) .. 2**(b-1) - 1)
    asymmetric  s = c (max x - min x) / (2**b - 1)      z = round(-c min x / s)
                levels s (-z .. 2**b - 1 - z)

where max and min count 0 in, so that 0 is a level.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def rounded(
    x: Float[Tensor, "*batch I"],
    bits: int,
    *,
    group_size: int = -1,
    symmetric: bool = True,
    clip: float = 1.0,
) -> Float[Tensor, "*batch I"]:
    """Round the last axis to its levels, each group by itself; keeps x's type.

    ``group_size`` divides I; -1 is one group. Computed in fp32 or better. A group of
    zeros stays zero.
    """
    size = x.shape[-1] if group_size == -1 else group_size
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, size))
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale = _safe(wide.abs().amax(-1, keepdim=True) * clip / most)
        level = (wide / scale).round_().clamp_(-most - 1, most)
    else:
        top = 2**bits - 1
        low = wide.amin(-1, keepdim=True).clamp(max=0) * clip
        high = wide.amax(-1, keepdim=True).clamp(min=0) * clip
        scale = _safe((high - low) / top)
        zero = (-low / scale).round_()
        level = (wide / scale).round_().add_(zero).clamp_(0, top).sub_(zero)
    made: Tensor = level.mul_(scale).flatten(-2).to(x.dtype)
    return made


def _safe(scale: Tensor) -> Tensor:
    """Return 1 for the scale of a group of zeros, or of values too small for one."""
    return torch.where(scale > 0, scale, 1.0)
