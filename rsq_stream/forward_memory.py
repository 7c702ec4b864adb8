"""The memory of one unit on its way through a block, from sizes alone."""

from rsq_stream.config import QuantizationPlan
from rsq_stream.importance_fields import HARD
from rsq_stream.model.architecture import Architecture

FP32 = 4
QUERIES = 128
"""Queries of a tile of the attention's column sums (``ops/column_sums.py``)."""


def forward_bytes(
    architecture: Architecture,
    plan: QuantizationPlan,
    stage: int,
    size: int,
    *,
    on_gpu: bool,
) -> int:
    """Count the most that one unit takes in the pass of a stage, in one stream.

    What it results in is part of that; what was read of it is not. A stage beyond the
    last is the pass that writes the block's outputs. ``size`` is the bytes of a value
    in the type that is computed in.
    """
    tokens = plan.unit_sequences * plan.sequence_length
    wide = size * tokens * architecture.width
    heads = size * tokens * architecture.heads * architecture.head_width
    keys = size * tokens * architecture.kv_heads * architecture.head_width
    mlp = size * tokens * architecture.mlp_width
    # In fp32: what comes, what is normalised, and one in between.
    norm = 3 * FP32 * tokens * architecture.width
    # Beside its input: v, q and k before RoPE and q after it; of the last one that is
    # rotated three parts more.
    attention = wide + max(4 * heads + 2 * keys, 2 * heads + 5 * keys)
    # Beside its input: gate, up and their product.
    inner = wide + 3 * mlp
    if stage == 0:
        made = max(norm, _weighing(architecture, plan, attention, inner, on_gpu=on_gpu))
    elif stage == 1:
        made = max(norm, attention)
    elif stage == 2:  # x stays for h, which is normalised; or what o makes of c
        made = wide + max(norm, attention, heads + 2 * wide)
    elif stage == 3:
        made = max(norm, inner)
    else:  # h stays for x'
        made = wide + max(norm, inner, mlp + 2 * wide)
    if plan.rounds_activations:
        rounded = architecture.mlp_width if stage >= 3 else architecture.width
        rounded = max(rounded, architecture.heads * architecture.head_width)
        made += 3 * FP32 * tokens * rounded
    if stage >= 3 and plan.mlp_rotation != "none":
        made += 2 * FP32 * tokens * architecture.mlp_width  # two factors of a product
    if stage in (1, 2) and plan.heads_rotation != "none":
        made += 2 * FP32 * tokens * architecture.heads * architecture.head_width
    return made


def _weighing(
    architecture: Architecture,
    plan: QuantizationPlan,
    attention: int,
    inner: int,
    *,
    on_gpu: bool,
) -> int:
    """Count what the weights of a unit's tokens take, the block's input beside it."""
    tokens = plan.unit_sequences * plan.sequence_length
    if plan.importance in HARD:
        return 0
    if plan.importance != "attncon":  # some take the whole block
        return 2 * FP32 * tokens * architecture.width + max(attention, inner)
    heads = FP32 * tokens * architecture.heads * architecture.head_width
    keys = FP32 * tokens * architecture.kv_heads * architecture.head_width
    if on_gpu:  # q and k once more, in fp32
        return attention + heads + keys
    # Logits of a tile, before and after the softmax; a key for each head.
    logits = 2 * FP32 * architecture.heads * QUERIES * tokens
    wide = FP32 * tokens * architecture.width
    return max(attention, wide + 2 * heads + 2 * keys + logits)
