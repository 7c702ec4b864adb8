"""What lies outside the blocks, as the output stores it: embedding, norm, head.

They are read from the source whenever they are asked for: none is kept in memory.
"""

from dataclasses import dataclass

from torch import Tensor

from rsq_stream.algorithm.solver import round_to_nearest
from rsq_stream.config import QuantizationPlan
from rsq_stream.grids import make_grid
from rsq_stream.model.architecture import EMBEDDING, FINAL_NORM, HEAD
from rsq_stream.ops.pool import Pool
from rsq_stream.packed_format import encode_linear
from rsq_stream.schemes import HEAD_LINEAR
from rsq_stream.source import Source


@dataclass(frozen=True)
class Outer:
    """The tensors of the output that belong to no block."""

    source: Source
    plan: QuantizationPlan
    pool: Pool

    def embedding(self) -> dict[str, Tensor]:
        """Give the embedding."""
        return {EMBEDDING: self.source.embedding()}

    def norm(self) -> dict[str, Tensor]:
        """Give the gain of the norm before the head."""
        return {FINAL_NORM: self.source.final_norm()}

    def head(self) -> dict[str, Tensor]:
        """Give the head, rounded to codes where the plan says so; none if tied."""
        if self.source.head_is_tied:
            return {}
        weight_VD = self.source.head()
        scheme = self.plan.scheme(HEAD_LINEAR, weight_VD.shape[1])
        if scheme is None:
            return {HEAD: weight_VD}
        solution = round_to_nearest(
            weight_VD.float(),
            make_grid(self.plan, scheme.bits, weight_VD.dtype),
            scheme.group_size,
            self.plan.tile_rows,
            self.pool,
        )
        return encode_linear(HEAD_LINEAR, solution, scheme, weight_VD.dtype)

    def tensor(self, name: str) -> Tensor | None:
        """Give one of them by its name in the output; None for any other."""
        for stored in (self.embedding, self.norm, self.head):
            found = stored().get(name)
            if found is not None:
                return found
        return None
