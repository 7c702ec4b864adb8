"""Qwen2 and Qwen2.5: q, k and v always have biases."""

from rsq_stream.model.families.base import Family

FAMILY = Family(
    model_type="qwen2",
    class_prefix="Qwen2",
    always_biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
