"""What a block's activations become on their way through it, as a scheme has it.

``Block`` calls this at one place each: on the input of its linears, and in attention
on q, k and v. K is rounded after RoPE, in a rotated basis: with a Hadamard matrix H
on each head of q and k, (q H) . (k H) = q . k, and H spreads what is large in one
channel of k over all of them (QuaRot, arXiv 2404.00456). Scales are those of one token
and KV head, so a token's K and V are what a cache would hold, whatever comes later.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.activation_rounding import rounded
from rsq_stream.algorithm.rotation.hadamard import hadamard_product, largest_factor
from rsq_stream.config.activations import NOTHING, ActivationFields
from rsq_stream.config.schemes import UNQUANTIZED


@dataclass(frozen=True)
class ActivationQuantizer:
    """Rounds what a scheme names; gives everything else back as it is."""

    scheme: ActivationFields = NOTHING

    def inputs(self, x_BTI: Float[Tensor, "B T I"]) -> Float[Tensor, "B T I"]:
        """Return the input of a linear."""
        scheme = self.scheme
        if scheme.activation_bits == UNQUANTIZED:
            return x_BTI
        return rounded(
            x_BTI,
            scheme.activation_bits,
            group_size=scheme.activation_group_size,
            symmetric=scheme.activation_symmetric,
            clip=scheme.activation_clip,
        )

    def keys(
        self, query_BHTK: Float[Tensor, "B H T K"], key_BGTK: Float[Tensor, "B G T K"]
    ) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B G T K"]]:
        """Return q and k, after RoPE, as attention multiplies them."""
        if self.scheme.kv_bits == UNQUANTIZED:
            return query_BHTK, key_BGTK
        return rotated_heads(query_BHTK), self._cached(rotated_heads(key_BGTK))

    def values(self, value_BGTK: Float[Tensor, "B G T K"]) -> Float[Tensor, "B G T K"]:
        """Return v as attention adds it up."""
        if self.scheme.kv_bits == UNQUANTIZED:
            return value_BGTK
        return self._cached(value_BGTK)

    def _cached(self, x_BGTK: Tensor) -> Tensor:
        scheme = self.scheme
        return rounded(
            x_BGTK,
            scheme.kv_bits,
            symmetric=scheme.kv_symmetric,
            clip=scheme.kv_clip,
        )


def rotated_heads(x_BHTK: Float[Tensor, "B H T K"]) -> Float[Tensor, "B H T K"]:
    """Compute ``x (I kron H) / sqrt(n)``, n the largest order that divides K."""
    width = x_BHTK.shape[-1]
    wide_LK = x_BHTK.to(torch.promote_types(x_BHTK.dtype, torch.float32))
    made_LK = hadamard_product(wide_LK.reshape(-1, width), largest_factor(width))
    return made_LK.reshape(x_BHTK.shape).to(x_BHTK.dtype)


AS_COMPUTED = ActivationQuantizer()
"""Rounds nothing."""
