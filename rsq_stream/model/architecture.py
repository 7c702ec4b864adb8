"""The sizes of one checkpoint, read from config.json and bounded.

A family is known by ``model_type`` in config.json; what it says of its blocks is in
``model/families``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from rsq_stream.errors import UnsupportedModelError
from rsq_stream.model.families import FAMILIES
from rsq_stream.model.families.base import Family, Linear, Stage
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD, block_prefix

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


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of one checkpoint, and the stages of its blocks."""

    family: Family
    block_stages: tuple[tuple[Stage, ...], ...]
    """The stages of each block; blocks of one kind share one tuple."""
    width: int
    mlp_width: int
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

    @property
    def blocks(self) -> int:
        """The number of decoder blocks."""
        return len(self.block_stages)

    def stages(self, block: int) -> tuple[Stage, ...]:
        """Return the stages of a block, in the order of the forward pass."""
        return self.block_stages[block]

    def linears(self, block: int) -> dict[str, Linear]:
        """Return the linears of a block by their names in it."""
        stages = self.stages(block)
        return {linear.name: linear for stage in stages for linear in stage.linears}

    @cached_property
    def kinds(self) -> dict[int, int]:
        """The first block of each kind, and how many blocks are of its kind.

        A dense model of 32 blocks has one kind: ``{0: 32}``.
        """
        first: dict[tuple[Stage, ...], int] = {}
        counts: dict[int, int] = {}
        for block, stages in enumerate(self.block_stages):
            kind = first.setdefault(stages, block)
            counts[kind] = counts.get(kind, 0) + 1
        return counts

    def model_linears(self) -> dict[str, tuple[int, Linear]]:
        """Return block and linear of every linear of the blocks, by its full name."""
        return {
            block_prefix(block) + name: (block, linear)
            for block in range(self.blocks)
            for name, linear in self.linears(block).items()
        }

    def size(self, axis: str) -> int:
        """Return the size of an axis that a ``Linear`` names."""
        return {
            "width": self.width,
            "heads": self.heads * self.head_width,
            "keys": self.kv_heads * self.head_width,
            "mlp": self.mlp_width,
        }[axis]

    def shape(self, linear: Linear) -> tuple[int, int]:
        """Return (outputs, inputs) of a linear."""
        return self.size(linear.outputs), self.size(linear.inputs)

    def linear_inputs(self) -> dict[str, int]:
        """Return the inputs of each linear that any block has, by its name there."""
        return {
            name: self.size(linear.inputs)
            for block in self.kinds
            for name, linear in self.linears(block).items()
        }

    def block_shapes(self, block: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of a block, by its name in the block."""
        linears = self.linears(block).values()
        norms = dict.fromkeys(linear.norm for linear in linears if linear.norm)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (self.width,))
        for linear in linears:
            shapes[f"{linear.name}.weight"] = self.shape(linear)
            if self.has_bias(linear.name):
                shapes[f"{linear.name}.bias"] = self.shape(linear)[:1]
        if self.family.head_norms:
            shapes["self_attn.q_norm.weight"] = (self.head_width,)
            shapes["self_attn.k_norm.weight"] = (self.head_width,)
        return shapes

    def block_entries(self, block: int) -> int:
        """Return the number of entries of all tensors of a block."""
        return sum(prod(shape) for shape in self.block_shapes(block).values())

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor outside the blocks."""
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocabulary, self.width),
            FINAL_NORM: (self.width,),
        }
        if not self.tied:
            shapes[LM_HEAD] = (self.vocabulary, self.width)
        return shapes

    def has_bias(self, linear: str) -> bool:
        """Return whether a linear, by its name in the block, has a bias."""
        if linear in self.family.always_biased:
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
    if not isinstance(kind, str) or kind not in FAMILIES:
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
    # config.json has it for every real model; older ones of some families do not.
    default = heads if family.kv_heads_default else None
    kv_heads = size("num_key_value_heads", default)
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"{where}: num_attention_heads ({heads}) must be a multiple of"
            f" num_key_value_heads ({kv_heads})"
        )
    if width % heads and (family.whole_heads or config.get("head_dim") is None):
        raise UnsupportedModelError(
            f"{where}: hidden_size ({width}) must be a multiple of"
            f" num_attention_heads ({heads})"
        )
    blocks = range(size("num_hidden_layers"))
    return Architecture(
        family=family,
        block_stages=tuple(family.stages(config, block) for block in blocks),
        width=width,
        mlp_width=size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=size("head_dim", family.head_width_default or width // heads),
        vocabulary=size("vocab_size"),
        longest=size("max_position_embeddings", 2048),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=has("attention_bias"),
        mlp_bias=has("mlp_bias"),
    )
