"""The memory of what comes before the stages of a block, from sizes alone."""

from math import prod

from rsq_stream.checkpoint.source import chunk_rows
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import LM_HEAD_LINEAR
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.tensor_names import EMBEDDING

FP32 = 4
_PART_BYTES = FP32 << 26
"""What a GPU rotates at a time (``model/fused_rotation.py``)."""
_CHUNK_COPIES, _ROUNDED_CHUNK_COPIES = 7, 18
"""Chunks in fp32 that rotating rows of the head takes, and rounding them; 6.5 and 17
seen."""
_ROTATION_COPIES = 4
"""A rotation's argument, that with its signs, its result, and one in between."""


def outer_bytes(architecture: Architecture, plan: QuantizationPlan) -> int:
    """Count a chunk of embedding or head on its way to the output."""
    vocabulary, width = architecture.outer_shapes()[EMBEDDING]
    kept = plan.scheme(LM_HEAD_LINEAR, width) is None
    copies = _CHUNK_COPIES if kept else _ROUNDED_CHUNK_COPIES
    return copies * FP32 * min(vocabulary, chunk_rows(width)) * width


def rotation_bytes(
    architecture: Architecture, plan: QuantizationPlan, stored: int, *, on_gpu: bool
) -> int:
    """Count what rotating the largest linear takes; or reading it, as it is stored."""
    largest = largest_linear(architecture)
    if plan.residual_rotation == "none":
        return stored * largest
    part = min(FP32 * largest, _PART_BYTES) if on_gpu else FP32 * largest
    return max(_ROTATION_COPIES * part, stored * largest)


def largest_linear(architecture: Architecture) -> int:
    """Return the weights of a block's largest linear."""
    return max(
        prod(architecture.shape(linear))
        for block in architecture.kinds
        for linear in architecture.linears(block).values()
    )
