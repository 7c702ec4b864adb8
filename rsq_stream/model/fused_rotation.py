"""Fold norm gains and rotations into a block's weights.

R1, on the residual stream: E <- E Q, W_in <- W_in diag(g) Q, W_out <- Q^T W_out. R2,
inside each value head: v's outputs times R, o's inputs likewise, so that attention
mixes rotated values and o undoes it. Nothing is left to do at inference: the portable
form. A full rotation also folds what ``online_rotation.py`` does to the inputs of o and
down into their weights. All in fp32; the caller rounds once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rsq_stream.algorithm.rotation.rotation import Rotation
from rsq_stream.model.families.base import Linear
from rsq_stream.model.online_rotation import NO_ROTATIONS, OnlineRotations

PART_ENTRIES = 1 << 26
"""Entries of a linear that are rotated at a time on a GPU."""


@dataclass(frozen=True)
class ModelRotation:
    """The rotations of a model; applied to whatever part of it is at hand."""

    residual: Rotation
    value: Rotation
    online: OnlineRotations = NO_ROTATIONS

    def block(
        self, tensors: dict[str, Tensor], linears: Iterable[Linear]
    ) -> dict[str, Tensor]:
        """Return a block's rotated tensors, fp32, by their names in the block.

        ``tensors`` is emptied, so that the block is never in memory twice.
        """
        rotated = dict(tensors)
        tensors.clear()
        linears = tuple(linears)
        for linear in linears:
            self._rotate_linear(linear, rotated)
        for norm in {linear.norm for linear in linears if linear.norm}:
            rotated[norm] = torch.ones_like(rotated[norm])
        return rotated

    def _rotate_linear(self, linear: Linear, tensors: dict[str, Tensor]) -> None:
        """Replace a linear's weight and bias, while the norms have their gains."""
        weight, bias = f"{linear.name}.weight", f"{linear.name}.bias"
        if linear.norm:
            scaled = partial(self._scaled, tensors[linear.norm])
            tensors[weight] = _in_parts(scaled, tensors[weight])
        if linear.writes_residual:
            tensors[weight] = _in_parts(
                self.residual.apply_to_outputs, tensors[weight], axis=1
            )
            if bias in tensors:
                tensors[bias] = self.residual.apply(tensors[bias][None])[0]
        if linear.value_heads == "outputs":
            heads_IO = self.value.apply_per_head(tensors[weight].T.contiguous())
            tensors[weight] = heads_IO.T.contiguous()
            if bias in tensors:
                tensors[bias] = self.value.apply_per_head(tensors[bias][None])[0]
        if linear.value_heads == "inputs":
            tensors[weight] = _in_parts(self.value.apply_per_head, tensors[weight])
        if linear.online_rotation == "heads":
            tensors[weight] = _in_parts(self.online.of_attention, tensors[weight])
        if linear.online_rotation == "mlp":
            tensors[weight] = _in_parts(self.online.of_mlp, tensors[weight])

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
    """Return the rows (or columns) that a GPU rotates at a time; elsewhere all."""
    if not weight_OI.is_cuda:
        return weight_OI.shape[axis]
    return max(1, PART_ENTRIES // weight_OI.shape[1 - axis])
