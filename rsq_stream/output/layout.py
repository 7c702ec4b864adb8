"""Shards and sizes of an output, from headers alone."""

from math import prod

import torch

from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.formats.base import ShardLayout
from rsq_stream.checkpoint.output_tensors import output_tensors
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.tensor_names import EMBEDDING, LM_HEAD


def plan_layouts(
    checkpoint: Checkpoint, architecture: Architecture, plan: QuantizationPlan
) -> list[ShardLayout]:
    """Lay out the output's shards from headers and plan alone."""

    def dtype_of(name: str) -> torch.dtype:
        known = EMBEDDING if name == LM_HEAD and architecture.tied else name
        return checkpoint.entry(known).dtype

    tensors = output_tensors(architecture, plan, dtype_of)
    return FORMATS[plan.output_format].layouts(tensors, plan.shard_bytes)


def bits_per_weight(architecture: Architecture, layouts: list[ShardLayout]) -> float:
    """Return the bits of the whole output per weight of the source model."""
    return _bits(layouts) / source_weights(architecture)


def output_bits(
    checkpoint: Checkpoint, architecture: Architecture, plan: QuantizationPlan
) -> int:
    """Count the bits of all tensors of a plan's output."""
    return _bits(plan_layouts(checkpoint, architecture, plan))


def _bits(layouts: list[ShardLayout]) -> int:
    return 8 * sum(
        tensor.size_bytes for layout in layouts for _, tensor in layout.places.values()
    )


def source_weights(architecture: Architecture) -> int:
    """Count the weights of the source model."""
    outer = sum(prod(shape) for shape in architecture.outer_shapes().values())
    return outer + sum(
        count * architecture.block_entries(block)
        for block, count in architecture.kinds.items()
    )
