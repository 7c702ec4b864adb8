"""What lies outside the blocks, as the output stores it: embedding, norm, head.

They are read from the source whenever they are asked for, and come in chunks of rows:
none is kept in memory, and of a large vocabulary none is ever whole there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.grids._planned import make_grid
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.source import Source
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import LM_HEAD_LINEAR
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD
from rsq_stream.runtime.worker_pool import Pool

Chunk = dict[str, Tensor]
"""The next rows of one or more tensors of the output, by name."""


@dataclass(frozen=True)
class EmbeddingAndHead:
    """The tensors of the output that belong to no block."""

    source: Source
    plan: QuantizationPlan
    pool: Pool

    def embedding(self) -> Iterator[Chunk]:
        """Return the embedding."""
        for weight_RD in self.source.embedding():
            yield {EMBEDDING: weight_RD}

    def norm(self) -> Iterator[Chunk]:
        """Return the gain of the norm before the head."""
        yield {FINAL_NORM: self.source.final_norm()}

    def head(self) -> Iterator[Chunk]:
        """Return the head, rounded to codes where the plan says so; none if tied."""
        if self.source.head_is_tied:
            return
        shape, stored = self.source.head_shape, FORMATS[self.plan.output_format]
        scheme = self.plan.scheme(LM_HEAD_LINEAR, shape[1])
        for weight_RD in self.source.head():
            if scheme is None:
                yield {LM_HEAD: weight_RD}
                continue
            solution = round_to_nearest(
                weight_RD.float(),
                make_grid(self.plan, scheme.bits, weight_RD.dtype),
                scheme.group_size,
                tile_rows=self.plan.tile_rows_of(shape[1]),
                pool=self.pool,
            )
            yield stored.encode_rows(LM_HEAD_LINEAR, solution, scheme, weight_RD.dtype)
        if scheme is not None:
            yield stored.encode_whole(LM_HEAD_LINEAR, shape)

    def tensor(self, name: str) -> Iterator[Chunk] | None:
        """Return one of them by its name in the output; None for any other."""
        if name == EMBEDDING:
            return self.embedding()
        if name == FINAL_NORM:
            return self.norm()
        if name.startswith(f"{LM_HEAD_LINEAR}."):
            return ({name: chunk[name]} for chunk in self.head() if name in chunk)
        return None
