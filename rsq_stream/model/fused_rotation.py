"""Fold norm gains and rotations into a block's weights.

R1, on the residual stream: E <- E Q, W_in <- W_in diag(g) Q, W_out <- Q^T W_out. R2,
inside each value head: v's outputs times R, o's inputs likewise, so that attention
mixes rotated values and o undoes it. Nothing is left to do at inference: the portable
form. A full rotation also folds what ``online_rotation.py`` does to the inputs of o and
down into their weights. All in fp32; the caller rounds once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rsq_stream.algorithm.rotation.rotation import Rotation
from rsq_stream.model.online_rotation import NO_ROTATIONS, OnlineRotations
from rsq_stream.model.tensor_names import ATTENTION_NORM, MLP_NORM

_READS_RESIDUAL = {
    "self_attn.q_proj": ATTENTION_NORM,
    "self_attn.k_proj": ATTENTION_NORM,
    "self_attn.v_proj": ATTENTION_NORM,
    "mlp.gate_proj": MLP_NORM,
    "mlp.up_proj": MLP_NORM,
}
_WRITES_RESIDUAL = ("self_attn.o_proj", "mlp.down_proj")
PART_ENTRIES = 1 << 26
"""Entries of a linear that are rotated at a time on a GPU."""


@dataclass(frozen=True)
class ModelRotation:
    """The rotations of a model; applied to whatever part of it is at hand."""

    residual: Rotation
    value: Rotation
    online: OnlineRotations = NO_ROTATIONS

    def block(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rotate a block's tensors, fp32, by their names in the block.

        ``tensors`` is empty afterwards: at no time is the block there twice.
        """
        rotated = dict(tensors)
        tensors.clear()
        for linear, norm in _READS_RESIDUAL.items():
            name = f"{linear}.weight"
            scaled = partial(self._scaled, rotated[norm])
            rotated[name] = _in_parts(scaled, rotated[name])
        for linear in _WRITES_RESIDUAL:
            name, bias = f"{linear}.weight", f"{linear}.bias"
            rotated[name] = _in_parts(
                self.residual.apply_to_outputs, rotated[name], axis=1
            )
            if bias in rotated:
                rotated[bias] = self.residual.apply(rotated[bias][None])[0]
        rotated[ATTENTION_NORM] = torch.ones_like(rotated[ATTENTION_NORM])
        rotated[MLP_NORM] = rotated[ATTENTION_NORM].clone()
        value, bias = "self_attn.v_proj.weight", "self_attn.v_proj.bias"
        output, down = "self_attn.o_proj.weight", "mlp.down_proj.weight"
        rotated[value] = self.value.apply_per_head(rotated[value].T.contiguous()).T
        rotated[value] = rotated[value].contiguous()
        if bias in rotated:
            rotated[bias] = self.value.apply_per_head(rotated[bias][None])[0]
        rotated[output] = _in_parts(self.value.apply_per_head, rotated[output])
        rotated[output] = _in_parts(self.online.of_attention, rotated[output])
        rotated[down] = _in_parts(self.online.of_mlp, rotated[down])
        return rotated

    def _scaled(self, gain_I: Tensor, weight_RI: Tensor) -> Tensor:
        """Compute W diag(g) Q."""
        return self.residual.apply(weight_RI * gain_I)

    def embedding(self, weight_RD: Tensor) -> Tensor:
        """Compute E Q of some rows of the embedding, rounded to E's type."""
        return self.residual.apply(weight_RD.float()).to(weight_RD.dtype)

    def head(self, weight_RD: Tensor, gain_D: Tensor) -> Tensor:
        """Compute W diag(g) Q of some rows, with the final norm's gain; W's type."""
        scaled_RD = weight_RD.float() * gain_D.float()
        return self.residual.apply(scaled_RD).to(weight_RD.dtype)


def _in_parts(
    function: Callable[[Tensor], Tensor], weight_OI: Tensor, axis: int = 0
) -> Tensor:
    """Apply what takes rows (or columns) one by one; on a GPU in place, in parts.

    Nowhere else: a product of another height may differ in the last bit.
    """
    length = _part_length(weight_OI, axis)
    if length >= weight_OI.shape[axis]:
        return function(weight_OI)
    for part in weight_OI.split(length, axis):
        part.copy_(function(part))
    return weight_OI


def _part_length(weight_OI: Tensor, axis: int) -> int:
    """Give the rows (or columns) that a GPU rotates at a time; elsewhere all."""
    if not weight_OI.is_cuda:
        return weight_OI.shape[axis]
    return max(1, PART_ENTRIES // weight_OI.shape[1 - axis])
