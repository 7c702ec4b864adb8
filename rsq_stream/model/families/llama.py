"""Llama 2 and 3, and the many models that use its classes."""

from rsq_stream.model.families.base import Family

FAMILY = Family(
    model_type="llama",
    class_prefix="Llama",
    bias_options=("attention_bias", "mlp_bias"),
    kv_heads_default=True,
    whole_heads=True,
)
