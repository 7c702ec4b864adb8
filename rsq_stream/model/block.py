"""One decoder block of transformers, filled from tensors and run stage by stage.

The layer is transformers' own, built without memory and filled with the block's
tensors. o_proj and down_proj are taken out of their modules, so that these give
their inputs; the block's stages are then, with what of a full rotation is online
applied to c and u,

    a = norm1(x);  c = attention(q(a), k(a), v(a));  h = x + o(c)
    m = norm2(h);  u = act(gate(m)) * up(m);         x' = h + down(u)

The inputs of linears (a, c, m, u), and K and V, may be rounded on their way. Weights
of linears may lie in host memory while the block computes on a GPU.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig

from rsq_stream.model.activation_quantizer import AS_COMPUTED, ActivationQuantizer
from rsq_stream.model.families.base import Family
from rsq_stream.model.online_rotation import NO_ROTATIONS, OnlineRotations
from rsq_stream.model.transformers_layers import Rope, transformers_class


class Block:
    """A decoder block whose weights can be read and replaced between stages."""

    def __init__(
        self,
        family: Family,
        config: PretrainedConfig,
        index: int,
        tensors: Mapping[str, Tensor],
        *,
        rope: Rope,
        online: OnlineRotations = NO_ROTATIONS,
        quantizer: ActivationQuantizer = AS_COMPUTED,
    ) -> None:
        with torch.device("meta"):
            layer = transformers_class(family, "DecoderLayer")(config, index)
        layer.load_state_dict(dict(tensors), strict=True, assign=True)
        layer.requires_grad_(requires_grad=False)
        # Where these are is where the block computes; large weights may lie elsewhere.
        self._place: Tensor = layer.input_layernorm.weight
        self._linears: dict[str, nn.Linear] = {
            name: module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        for module in self._linears.values():
            # A function of its own would hold the module that holds it, and with it the
            # weights until Python looks for such circles: several blocks later.
            module.__class__ = _Linear
        self._attention_norm: nn.Module = layer.input_layernorm
        self._mlp_norm: nn.Module = layer.post_attention_layernorm
        self._attention: nn.Module = layer.self_attn
        self._mlp: nn.Module = layer.mlp
        self._attention.o_proj = nn.Identity()
        self._mlp.down_proj = nn.Identity()
        self._rope = rope
        self._online = online
        self._quantizer = quantizer

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return self._place.device

    @property
    def attention_width(self) -> int:
        """The width of c, attention's output."""
        return self._linears["self_attn.o_proj"].in_features

    @property
    def inner_width(self) -> int:
        """The width of u, the MLP's inner activation."""
        return self._linears["mlp.down_proj"].in_features

    def weight(self, linear: str) -> Float[Tensor, "O I"]:
        """Return the weight of a linear as it is now, where it lies."""
        return self._linears[linear].weight

    def replace_weight(self, linear: str, weight_OI: Float[Tensor, "O I"]) -> None:
        """Put another weight in a linear's place; later stages run with it."""
        old = self._linears[linear].weight
        self._linears[linear].weight = nn.Parameter(
            weight_OI.to(old), requires_grad=False
        )

    def attention_input(self, x_BTD: Tensor) -> Tensor:
        """Compute a = norm1(x): the input of q, k, v."""
        return self._quantizer.inputs(self._attention_norm(x_BTD))

    def column_sums(self, a_BTD: Tensor) -> Float[Tensor, "B T"]:
        """Return the attention each token receives, by the present q and k."""
        sums_BT: Tensor = self._attend(a_BTD, column_sums=True)[1]
        return sums_BT

    def attention_output(self, a_BTD: Tensor) -> Tensor:
        """Compute c = attention(q(a), k(a), v(a)): the input of o, rotated."""
        c_BTI, _ = self._attend(a_BTD)
        return self._quantizer.inputs(self._online.of_attention(c_BTI))

    def after_attention(self, x_BTD: Tensor, c_BTI: Tensor) -> Tensor:
        """Compute h = x + o(c)."""
        h_BTD: Tensor = x_BTD + self._linears["self_attn.o_proj"](c_BTI)
        return h_BTD

    def mlp_input(self, h_BTD: Tensor) -> Tensor:
        """Compute m = norm2(h): the input of gate and up."""
        return self._quantizer.inputs(self._mlp_norm(h_BTD))

    def mlp_output(self, m_BTD: Tensor) -> Tensor:
        """Compute u = act(gate(m)) * up(m): the input of down, rotated."""
        u_BTI: Tensor = self._mlp(m_BTD)
        return self._quantizer.inputs(self._online.of_mlp(u_BTI))

    def after_mlp(self, h_BTD: Tensor, u_BTI: Tensor) -> Tensor:
        """Compute x' = h + down(u): the input of the next block."""
        x_BTD: Tensor = h_BTD + self._linears["mlp.down_proj"](u_BTI)
        return x_BTD

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Run the whole block."""
        c_BTI = self.attention_output(self.attention_input(x_BTD))
        h_BTD = self.after_attention(x_BTD, c_BTI)
        return self.after_mlp(h_BTD, self.mlp_output(self.mlp_input(h_BTD)))

    def _attend(self, a_BTD: Tensor, **options: bool) -> tuple[Tensor, Any]:
        rope, tokens = self._rope, a_BTD.shape[1]
        output: tuple[Tensor, Any] = self._attention(
            hidden_states=a_BTD,
            position_embeddings=(rope.cos_BTK[:, :tokens], rope.sin_BTK[:, :tokens]),
            attention_mask=None,
            position_ids=rope.position_BT[:, :tokens],
            quantizer=self._quantizer,
            **options,
        )
        return output


class _Linear(nn.Linear):
    """A linear whose weight may lie in host memory, and is fetched for this once."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute W x + b."""
        return nn.functional.linear(x, self.weight.to(x.device), self.bias)
