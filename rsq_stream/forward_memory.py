"""The memory of one unit on its way through a block, from sizes alone."""

from rsq_stream.config import QuantizationPlan
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
    """Count what one unit takes in the pass of a stage, in one stream.

    ``size`` is the bytes of a value in the type that is computed in.
    """
    tokens = plan.unit_sequences * plan.sequence_length
    width, mlp = architecture.width, architecture.mlp_width
    heads = architecture.heads * architecture.head_width
    keys = architecture.kv_heads * architecture.head_width
    norm = 3 * FP32 * tokens * width  # norms compute in fp32
    # q and k before and after RoPE, v, what comes out.
    attention = size * tokens * (4 * heads + 4 * keys)
    if stage == 0:
        made = norm
        if plan.importance == "attncon":
            made += attention + 2 * FP32 * tokens * (heads + keys)
            if not on_gpu:  # logits of a tile, before and after the softmax
                made += 2 * FP32 * architecture.heads * QUERIES * tokens
                made += FP32 * tokens * heads  # a key for each head
        elif plan.importance != "uniform":
            made += attention + 4 * size * tokens * mlp
    elif stage in (1, 2):
        made = norm + attention
    else:
        made = norm + 4 * size * tokens * mlp
    if plan.rounds_activations:
        made += 3 * FP32 * tokens * max(width, mlp if stage == 3 else heads)
    if stage == 3 and plan.mlp_rotation != "none":
        made += 2 * FP32 * tokens * mlp  # two factors of a Hadamard product
    if stage in (1, 2) and plan.heads_rotation != "none":
        made += 2 * FP32 * tokens * heads
    return made + 2 * size * tokens * width  # x and what is added to it
