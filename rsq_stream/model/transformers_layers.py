"""Classes, configs and rotary tables of transformers."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from rsq_stream.model.attention import NAME as ATTENTION
from rsq_stream.model.families.base import Family


def transformers_class(family: Family, suffix: str) -> type:
    """Look up a class of the family's module, such as its ``DecoderLayer``."""
    kind = family.model_type
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    found: type = getattr(module, family.class_prefix + suffix)
    return found


def model_config(family: Family, config: Mapping[str, Any]) -> PretrainedConfig:
    """Build transformers' config object, without any quantization."""
    kind = family.model_type
    module = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
    made: PretrainedConfig = getattr(module, family.class_prefix + "Config").from_dict(
        {key: value for key, value in config.items() if key != "quantization_config"}
    )
    return made


def layer_config(family: Family, config: Mapping[str, Any]) -> PretrainedConfig:
    """Build transformers' config object, with this tool's attention function."""
    made = model_config(family, config)
    made._attn_implementation = ATTENTION
    return made


class Rope:
    """cos and sin of the rotary embedding for positions 0 .. T-1, made once."""

    def __init__(
        self,
        family: Family,
        config: PretrainedConfig,
        *,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        module = transformers_class(family, "RotaryEmbedding")(config=config).to(device)
        position_BT = torch.arange(tokens, device=device)[None]
        like = torch.zeros((), dtype=dtype, device=device)
        self.position_BT = position_BT
        self.cos_BTK, self.sin_BTK = module(like, position_BT)
