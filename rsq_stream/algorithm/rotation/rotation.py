"""Rotations that a plan can name: Q with Q Q^T = I, applied from the right.

Q = diag(signs) H / sqrt(n) with signs from the seed (the randomized Hadamard of
QuIP#, QuaRot and RSQ). Where n has no Hadamard matrix that can be built, H is
block-diagonal with the largest order that divides n; where that order is small
and n is not large, Q is a seeded orthogonal matrix.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.rotation.hadamard import (
    factors_of,
    hadamard_product,
    largest_factor,
)

_LARGEST_DENSE = 4096
"""Above this width an orthogonal matrix costs more than it gives."""
_SMALLEST_BLOCK = 64
"""Below this a block-diagonal Hadamard mixes too few inputs to be worth it."""


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """An orthogonal matrix of a given size, by name and seed."""

    name: str
    """``hadamard-N``, ``block-hadamard-B`` or ``orthogonal-N``."""
    size: int
    order: int
    """Order of the Hadamard block; 0 for a dense orthogonal matrix."""
    signs_N: Tensor
    dense_NN: Tensor | None = None

    def apply(self, x_LN: Float[Tensor, "L N"]) -> Float[Tensor, "L N"]:
        """Compute ``x Q`` in x's type (fp32 or better)."""
        if self.dense_NN is not None:
            return x_LN @ self.dense_NN.to(x_LN)
        return hadamard_product(x_LN * self.signs_N.to(x_LN), self.order)

    def apply_to_outputs(self, weight_NI: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        """Compute ``Q^T W``: the layer's outputs come out rotated."""
        return self.apply(weight_NI.T.contiguous()).T.contiguous()

    def apply_per_head(self, x_LN: Float[Tensor, "L N"]) -> Float[Tensor, "L N"]:
        """Rotate each run of ``size`` columns by itself: ``x (I kron Q)``."""
        return self.apply(x_LN.reshape(-1, self.size)).reshape(x_LN.shape)

    def apply_across_heads(self, x_LN: Float[Tensor, "L N"]) -> Float[Tensor, "L N"]:
        """Mix the ``size`` heads of each row, place by place: ``x (Q kron I)``."""
        x_LKH = x_LN.reshape(len(x_LN), self.size, -1).transpose(1, 2)
        mixed_LKH = self.apply(x_LKH.reshape(-1, self.size)).reshape(x_LKH.shape)
        return mixed_LKH.transpose(1, 2).reshape(x_LN.shape)

    def fingerprint(self) -> float:
        """Return a number that another construction of Q can be checked with.

        ``sum_j (x Q)_j cos(j)`` of the row ``x_j = (j mod 97) / 97``, j from 0; six
        decimals.
        """
        place_N = torch.arange(self.size, dtype=torch.float64)
        turned_N = self.apply((place_N % 97 / 97)[None])[0]
        return round(float(turned_N @ place_N.cos()), 6)


def rotation_name(size: int) -> str:
    """Choose the rotation for a size; the name goes into the plan."""
    if factors_of(size) is not None:
        return f"hadamard-{size}"
    block = largest_factor(size)
    if block >= _SMALLEST_BLOCK or size > _LARGEST_DENSE:
        return f"block-hadamard-{block}"
    return f"orthogonal-{size}"


def make_rotation(name: str, size: int, seed: int) -> Rotation:
    """Build the rotation that a plan names; signs come from the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    kind, _, order = name.rpartition("-")
    if kind == "orthogonal":
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        # The sign of R's diagonal is LAPACK's choice; fixing it makes Q unique.
        q_NN, r_NN = torch.linalg.qr(gaussian)
        dense = q_NN * r_NN.diagonal().sign()
        return Rotation(
            name=name, size=size, order=0, signs_N=signs.float(), dense_NN=dense
        )
    return Rotation(name=name, size=size, order=int(order), signs_N=signs.float())
