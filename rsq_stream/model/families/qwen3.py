"""Qwen3, dense: RMS norms on each head of q and k, and heads of 128 by default."""

from rsq_stream.model.families.base import Family

FAMILY = Family(
    model_type="qwen3",
    class_prefix="Qwen3",
    bias_options=("attention_bias",),
    head_norms=True,
    head_width_default=128,
)
