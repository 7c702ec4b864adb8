"""The families of decoders that are supported: one table decides.

A family is known by ``model_type`` in config.json. All four share the names of
their parameters and the order norm -> attention -> norm -> gated MLP; they
differ in biases, in norms on q and k, and in how the head width is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsq_stream.errors import UnsupportedModelError
from rsq_stream.model.families import FAMILIES
from rsq_stream.model.families.base import LINEARS, Family
from rsq_stream.model.tensor_names import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MLP_NORM,
)

_LARGEST = {
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**11,
    "num_attention_heads": 2**11,
    "num_key_value_heads": 2**11,
    "head_dim": 2**12,
    "vocab_size": 2**22,
    "max_position_embeddings": 2**25,
}
"""Upper bounds of what config.json may say; far above any model there is."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of one checkpoint, read from config.json and bounded."""

    family: Family
    width: int
    mlp_width: int
    blocks: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    longest: int
    """Positions the model was made for."""
    tied: bool
    """The head is the embedding."""
    attention_bias: bool
    mlp_bias: bool

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Give (outputs, inputs) of one linear of a block."""
        attention = self.heads * self.head_width
        keys = self.kv_heads * self.head_width
        return {
            "self_attn.q_proj": (attention, self.width),
            "self_attn.k_proj": (keys, self.width),
            "self_attn.v_proj": (keys, self.width),
            "self_attn.o_proj": (self.width, attention),
            "mlp.gate_proj": (self.mlp_width, self.width),
            "mlp.up_proj": (self.mlp_width, self.width),
            "mlp.down_proj": (self.width, self.mlp_width),
        }[name]

    def linear_inputs(self) -> dict[str, int]:
        """Give the inputs of each linear of a block."""
        return {name: self.linear_shape(name)[1] for name in LINEARS}

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of every tensor of a block, by its name in the block."""
        shapes: dict[str, tuple[int, ...]] = {
            ATTENTION_NORM: (self.width,),
            MLP_NORM: (self.width,),
        }
        for name in LINEARS:
            shapes[f"{name}.weight"] = self.linear_shape(name)
            if self.has_bias(name):
                shapes[f"{name}.bias"] = self.linear_shape(name)[:1]
        if self.family.head_norms:
            shapes["self_attn.q_norm.weight"] = (self.head_width,)
            shapes["self_attn.k_norm.weight"] = (self.head_width,)
        return shapes

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of every tensor outside the blocks."""
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocabulary, self.width),
            FINAL_NORM: (self.width,),
        }
        if not self.tied:
            shapes[HEAD] = (self.vocabulary, self.width)
        return shapes

    def has_bias(self, linear: str) -> bool:
        """Whether a linear of a block has a bias."""
        if linear in self.family.biases:
            return True
        return self.attention_bias if linear.startswith("self_attn") else self.mlp_bias


def read_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Check config.json and take the sizes from it.

    Raises
    ------
    UnsupportedModelError
        The family is not in the table, or a size is missing or out of bounds.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModelError(
            f"{where}: model_type {kind!r} is not supported; supported are {known}"
        )
    family = FAMILIES[kind]
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(
            f"{where}: hidden_act must be 'silu', not {config['hidden_act']!r}"
        )

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= _LARGEST[name]:
            raise UnsupportedModelError(
                f"{where}: {name} must be a whole number from 1 to {_LARGEST[name]},"
                f" not {value!r}"
            )
        return value

    def has(option: str) -> bool:
        return option in family.bias_options and bool(config.get(option, False))

    width, heads = size("hidden_size"), size("num_attention_heads")
    # Other families have other defaults; config.json says it for every real model.
    kv_heads = size("num_key_value_heads", heads if kind == "llama" else None)
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"{where}: num_attention_heads ({heads}) must be a multiple of"
            f" num_key_value_heads ({kv_heads})"
        )
    if width % heads and (kind == "llama" or config.get("head_dim") is None):
        raise UnsupportedModelError(
            f"{where}: hidden_size ({width}) must be a multiple of"
            f" num_attention_heads ({heads})"
        )
    return Architecture(
        family=family,
        width=width,
        mlp_width=size("intermediate_size"),
        blocks=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        # Qwen3's own default is 128 whatever the width; transformers fills it in.
        head_width=size("head_dim", 128 if kind == "qwen3" else width // heads),
        vocabulary=size("vocab_size"),
        longest=size("max_position_embeddings", 2048),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=has("attention_bias"),
        mlp_bias=has("mlp_bias"),
    )
