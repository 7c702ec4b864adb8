"""The source model part by part: read from its shards and rotated.

Everything comes as it goes into the solver or the output: blocks in fp32, what
lies outside of them rounded once to the source's type. Embedding and head come in
chunks of rows: of a large vocabulary neither is ever whole in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from rsq_stream.algorithm.rotation.rotation import make_rotation
from rsq_stream.checkpoint.output_tensors import output_is_tied
from rsq_stream.checkpoint.prefetch import BlockPrefetch
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.checkpoint.source_identity import SourceIdentity
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import CheckpointError
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.fused_rotation import ModelRotation
from rsq_stream.model.online_rotation import planned_rotations
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD, block_prefix
from rsq_stream.storage.journal import SourceRecord

CHUNK_BYTES = 16 << 20
"""A chunk of the embedding or head takes at most about this much in fp32."""
_CHUNK_ROWS = 8192
"""The rows of a chunk, where a row is not long."""
_WHOLE_ROWS = 32
"""Rows come by so many: packed along the rows, codes then fill whole words."""


class Source:
    """A full-precision checkpoint as one plan sees it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        architecture: Architecture,
        plan: QuantizationPlan,
        device: torch.device,
        identity: SourceIdentity | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the checkpoint as it is; an identity is told of whatever is read.

        ``check`` may stop who waits for a block that is being read ahead.
        """
        self._checkpoint = checkpoint
        self._identity = identity
        self._architecture = architecture
        self._plan = plan
        self._device = device
        self._rotation = _rotation(plan, architecture)
        self._ahead = BlockPrefetch(self._read_block, check)

    def embedding(self) -> Iterator[Tensor]:
        """Return the embedding as the output stores it, some rows after the other."""
        for weight_RD in self._chunks(EMBEDDING):
            yield self._embedded(weight_RD)

    def embedding_rows(self, index_N: Tensor) -> Tensor:
        """Return some rows of the embedding, as the output stores them.

        A few rows have no sha256: for that, let ``embedding`` go by before.
        """
        parts = [self._checkpoint.read_rows(EMBEDDING, index_N)]
        (weight_ND,) = self._finite(EMBEDDING, parts)
        return self._embedded(weight_ND)

    def _embedded(self, weight_RD: Tensor) -> Tensor:
        if self._rotation is None:
            return weight_RD
        return self._rotation.embedding(weight_RD.to(self._device)).cpu()

    def head(self) -> Iterator[Tensor]:
        """Return the head as the output stores it: untied, where it was tied."""
        chunks = self._chunks(EMBEDDING if self._architecture.tied else LM_HEAD)
        if self._rotation is None:
            yield from chunks
            return
        gain_D = self._read(FINAL_NORM).to(self._device)
        for weight_RD in chunks:
            yield self._rotation.head(weight_RD.to(self._device), gain_D).cpu()

    def _chunks(self, name: str) -> Iterator[Tensor]:
        rows = chunk_rows(self._architecture.width)
        return self._sound(name, self._checkpoint.read_chunks(name, rows))

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Vocabulary and width."""
        return self._architecture.outer_shapes()[EMBEDDING]

    @property
    def head_is_tied(self) -> bool:
        """Whether the output has no head of its own: its embedding is the head."""
        return output_is_tied(self._architecture, self._plan)

    def final_norm(self) -> Tensor:
        """Return the last norm's gain; after a rotation it is in the head."""
        gain_D = self._read(FINAL_NORM)
        return torch.ones_like(gain_D) if self._rotation else gain_D

    def block(self, index: int) -> dict[str, Tensor]:
        """Read a block and rotate it; fp32, by the names in the block."""
        read = self._ahead.take(index)
        tensors = {name: read.pop(name).to(self._device).float() for name in list(read)}
        if self._rotation is None:
            return tensors
        return self._rotation.block(tensors, self._architecture.linears(index).values())

    def read_ahead(self, index: int) -> None:
        """Read a block into host memory, as it is stored, before it is asked for."""
        if index < self._architecture.blocks:
            self._ahead.begin(index)

    def _read_block(self, index: int) -> dict[str, Tensor]:
        """Read a block's tensors, hashed and sound; any thread may."""
        names = list(self._architecture.block_shapes(index))
        read = self._checkpoint.read_many(block_prefix(index), names)
        return {
            name: tensor
            for name in names
            for tensor in self._sound(block_prefix(index) + name, [read[name]])
        }

    def unjournalled(self) -> SourceRecord | None:
        """Return what was learnt of the source's content, to be journalled."""
        return self._identity.unjournalled() if self._identity else None

    def _read(self, name: str) -> Tensor:
        (tensor,) = self._sound(name, [self._checkpoint.read(name)])
        return tensor

    def _sound(self, name: str, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield a tensor part by part, or refuse it: no later stage could mend it.

        Raises
        ------
        CheckpointError
            It holds NaN or infinity, or is not what it was when it was read before.
        """
        if self._identity is not None:
            parts = self._identity.checked(name, parts)
        return self._finite(name, parts)

    def _finite(self, name: str, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            # A sum is one pass without a mask, of 16-bit values quickest in their own
            # type; one that is bad, or too large for that, pays for the search.
            if not bool(part.sum().isfinite()) and not bool(part.isfinite().all()):
                shard = self._checkpoint.entry(name).shard
                raise CheckpointError(
                    f"{self._checkpoint.files.where}/{shard}: {name} holds NaN or"
                    " infinity; fetch the checkpoint again"
                )
            yield part

    def unquantized(
        self, index: int, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return a block's norms, biases and unquantized linears, as stored."""
        prefix, linears = block_prefix(index), self._architecture.linears(index)
        return {
            prefix + name: tensor.to(self._checkpoint.entry(prefix + name).dtype)
            for name, tensor in tensors.items()
            if name.removesuffix(".weight") not in linears
            or self._keeps(prefix + name, tensor)
        }

    def _keeps(self, name: str, weight_OI: Tensor) -> bool:
        linear = name.removesuffix(".weight")
        return self._plan.scheme(linear, weight_OI.shape[1]) is None

    def linear_types(self, index: int) -> dict[str, torch.dtype]:
        """Return the stored type of each linear of a block."""
        prefix = block_prefix(index)
        return {
            name: self._checkpoint.entry(f"{prefix}{name}.weight").dtype
            for name in self._architecture.linears(index)
        }


def _rotation(
    plan: QuantizationPlan, architecture: Architecture
) -> ModelRotation | None:
    """Build the plan's rotations; their signs come from the seed."""
    if plan.residual_rotation == "none":
        return None
    residual = make_rotation(plan.residual_rotation, architecture.width, plan.seed)
    # Another stream of signs, so that equal sizes do not get equal rotations.
    value = make_rotation(
        plan.value_rotation, architecture.head_width, plan.seed + 2**32
    )
    return ModelRotation(residual, value, planned_rotations(plan, architecture))


def chunk_rows(width: int) -> int:
    """Return the rows of a chunk of the embedding or head; decides no byte."""
    fitting = min(_CHUNK_ROWS, CHUNK_BYTES // (4 * width))
    return max(_WHOLE_ROWS, fitting // _WHOLE_ROWS * _WHOLE_ROWS)
