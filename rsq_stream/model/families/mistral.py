"""Mistral: a sliding window in some of its models, and no biases."""

from rsq_stream.model.families.base import Family

FAMILY = Family(model_type="mistral", class_prefix="Mistral")
