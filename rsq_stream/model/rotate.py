"""Fold norm gains and rotations into a block's weights.

R1, on the residual stream: E <- E Q, W_in <- W_in diag(g) Q, W_out <- Q^T W_out.
R2, inside each value head: v's outputs times R, o's inputs likewise, so that
attention mixes rotated values and o undoes it. Nothing is left to do at
inference: the portable form. A full rotation also folds what ``online.py`` does to
the inputs of o and down into their weights. All in fp32; the caller rounds once.
"""

from dataclasses import dataclass

from torch import Tensor

from rsq_stream.algorithm.rotation import Rotation
from rsq_stream.model.architecture import ATTENTION_NORM, MLP_NORM
from rsq_stream.model.online import NO_ROTATIONS, OnlineRotations

_READS_RESIDUAL = {
    "self_attn.q_proj": ATTENTION_NORM,
    "self_attn.k_proj": ATTENTION_NORM,
    "self_attn.v_proj": ATTENTION_NORM,
    "mlp.gate_proj": MLP_NORM,
    "mlp.up_proj": MLP_NORM,
}
_WRITES_RESIDUAL = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class ModelRotation:
    """The rotations of a model; applied to whatever part of it is at hand."""

    residual: Rotation
    value: Rotation
    online: OnlineRotations = NO_ROTATIONS

    def block(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rotate a block's tensors, fp32, by their names in the block."""
        rotated = dict(tensors)
        for linear, norm in _READS_RESIDUAL.items():
            name = f"{linear}.weight"
            rotated[name] = self.residual.apply(rotated[name] * tensors[norm])
        for linear in _WRITES_RESIDUAL:
            name, bias = f"{linear}.weight", f"{linear}.bias"
            rotated[name] = self.residual.apply_to_outputs(rotated[name])
            if bias in rotated:
                rotated[bias] = self.residual.apply(rotated[bias][None])[0]
        rotated[ATTENTION_NORM] = tensors[ATTENTION_NORM].new_ones(
            tensors[ATTENTION_NORM].shape
        )
        rotated[MLP_NORM] = rotated[ATTENTION_NORM].clone()
        value, bias = "self_attn.v_proj.weight", "self_attn.v_proj.bias"
        output, down = "self_attn.o_proj.weight", "mlp.down_proj.weight"
        rotated[value] = self.value.apply_per_head(rotated[value].T.contiguous()).T
        rotated[value] = rotated[value].contiguous()
        if bias in rotated:
            rotated[bias] = self.value.apply_per_head(rotated[bias][None])[0]
        rotated[output] = self.value.apply_per_head(rotated[output])
        rotated[output] = self.online.of_attention(rotated[output])
        rotated[down] = self.online.of_mlp(rotated[down])
        return rotated

    def embedding(self, weight_RD: Tensor) -> Tensor:
        """Compute E Q of some rows of the embedding, rounded to E's type."""
        return self.residual.apply(weight_RD.float()).to(weight_RD.dtype)

    def head(self, weight_RD: Tensor, gain_D: Tensor) -> Tensor:
        """Compute W diag(g) Q of some rows, with the final norm's gain; W's type."""
        scaled_RD = weight_RD.float() * gain_D.float()
        return self.residual.apply(scaled_RD).to(weight_RD.dtype)
