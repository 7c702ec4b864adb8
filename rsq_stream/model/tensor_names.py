"""Names of tensors, and where in the model they belong."""

import re

_IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
ATTENTION_NORM = "input_layernorm.weight"
MLP_NORM = "post_attention_layernorm.weight"


def block_prefix(block: int) -> str:
    """Give the prefix of a block's tensors in the checkpoint."""
    return f"model.layers.{block}."


def role(linear: str) -> str:
    """Give what a linear is in its block: ``q`` of ``self_attn.q_proj``."""
    return linear.rpartition(".")[2].removesuffix("_proj")


def block_of(name: str) -> int | None:
    """Give the block that a tensor of the checkpoint belongs to; None outside."""
    found = _IN_BLOCK.match(name)
    return int(found[1]) if found else None
