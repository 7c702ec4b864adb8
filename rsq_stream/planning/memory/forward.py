"""The memory of one unit on its way through a block, from sizes alone."""

from rsq_stream.algorithm.gptq.error_propagation import OUTPUTS
from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.families.base import Activation, Stage
from rsq_stream.ops.column_sums import QUERIES

FP32 = 4


def unit_bytes(
    architecture: Architecture,
    plan: QuantizationPlan,
    stage: Stage,
    size: int,
    *,
    on_gpu: bool,
) -> int:
    """Count the most that one unit takes in the pass for a stage's statistics.

    With two streams they come one after the other, and then their difference is made.
    """
    through = forward_bytes(architecture, plan, stage, size, on_gpu=on_gpu)
    if plan.streams == 1:
        return through
    tokens = plan.unit_tokens
    group = stage.groups[0]
    outputs, inputs = architecture.shape(group.linears[0])
    held, difference = size * tokens * inputs, FP32 * tokens * inputs
    # The difference and that times weights; of other types both inputs in fp32 first.
    apart = difference * (2 if size == FP32 else 3)
    if group.alone:  # the output's error, and in fp32 the residuals'
        result = FP32 * tokens * outputs
        apart = max(apart, difference + 5 * result)
        if on_gpu:  # its two terms, and of W some rows that may be fetched
            fetched = size * min(OUTPUTS, outputs) * inputs
            apart = max(apart, 2 * difference + fetched + result)
    return max(held + through, plan.streams * held + apart)


def forward_bytes(
    architecture: Architecture,
    plan: QuantizationPlan,
    stage: Stage | None,
    size: int,
    *,
    on_gpu: bool,
) -> int:
    """Count the most that one unit takes in the pass of a stage, in one stream.

    The count includes the result, and not what was read. A stage of None is the pass
    that writes the block's outputs. ``size`` is the bytes of a value in the type that
    is computed in.
    """
    tokens = plan.unit_tokens
    wide = size * tokens * architecture.width
    heads = size * tokens * architecture.heads * architecture.head_width
    keys = size * tokens * architecture.kv_heads * architecture.head_width
    mlp = size * tokens * architecture.mlp_width
    # In fp32: what comes, what is normalised, one in between, and a token's size.
    norm = FP32 * tokens * (3 * architecture.width + 2)
    # Beside its input: v, q and k before RoPE and q after it; of the last one that is
    # rotated three parts more.
    attention = wide + max(4 * heads + 2 * keys, 2 * heads + 5 * keys)
    # Beside its input: gate, up and their product.
    inner = wide + 3 * mlp
    if plan.mlp_rotation != "none":
        # The product, and in fp32 two factors' results; one is what comes.
        inner = max(inner, wide + 2 * mlp + 2 * FP32 * tokens * architecture.mlp_width)
    reads = stage.input if stage else None
    if reads is Activation.ATTENTION_INPUT:
        made = max(norm, _weighing(architecture, plan, attention, inner, on_gpu=on_gpu))
    elif reads is Activation.ATTENTION_OUTPUT:
        made = max(norm, attention)
    elif reads is Activation.MLP_INPUT:
        # x stays for h, which is normalised; or what o makes of c.
        made = wide + max(norm, attention, heads + 2 * wide)
    elif reads is Activation.MLP_INNER:
        made = max(norm, inner)
    else:  # h stays for x'
        made = wide + max(norm, inner, mlp + 2 * wide)
    if plan.rounds_activations:
        inner_mlp = reads in (Activation.MLP_INNER, None)
        widest = architecture.mlp_width if inner_mlp else architecture.width
        if reads in (Activation.ATTENTION_OUTPUT, Activation.MLP_INPUT):
            widest = max(widest, architecture.heads * architecture.head_width)
        held = 0 if reads is Activation.ATTENTION_INPUT else wide
        # In fp32 before and after rounding; K and V have theirs in the attention.
        rounding = (size + 2 * FP32) * tokens * widest + held
        made = max(made + FP32 * tokens * architecture.kv_heads, rounding)
    return made


def _weighing(
    architecture: Architecture,
    plan: QuantizationPlan,
    attention: int,
    inner: int,
    *,
    on_gpu: bool,
) -> int:
    """Return the bytes that weighing a unit's tokens takes, its input beside it."""
    strategy = STRATEGIES[plan.importance]
    if strategy.score is None:
        return 0
    sums = 0
    if "attention" in strategy.needs:
        sums = _column_sums(architecture, plan, attention, on_gpu=on_gpu)
        if len(strategy.needs) == 1:  # the sums are the scores
            return sums
    tokens = plan.unit_tokens
    # Copies of the input in fp32, beside the whole block because some run it.
    scores = 4 * FP32 * tokens * architecture.width + max(attention, inner)
    return max(sums, scores)


def _column_sums(
    architecture: Architecture, plan: QuantizationPlan, attention: int, *, on_gpu: bool
) -> int:
    """Return the bytes of the attention that each token receives, and of its making."""
    tokens = plan.unit_tokens
    heads = FP32 * tokens * architecture.heads * architecture.head_width
    keys = FP32 * tokens * architecture.kv_heads * architecture.head_width
    if on_gpu:  # q and k once more, in fp32
        return attention + heads + keys
    # Of a tile of queries: logits before and after the softmax, and how far the keys
    # are (int64, and a mask); a key for each head.
    logits = QUERIES * (2 * FP32 * architecture.heads * tokens + 9 * QUERIES)
    scaled = QUERIES * FP32 * architecture.heads * architecture.head_width
    wide = FP32 * tokens * architecture.width
    return wide + max(attention, wide + 2 * heads + 2 * keys + logits + scaled)
