"""Names of tensors, and where in the model they belong."""

import re

_IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def block_prefix(block: int) -> str:
    """Return the prefix of a block's tensors in the checkpoint."""
    return f"model.layers.{block}."


def block_of(name: str) -> int | None:
    """Return the block that a tensor of the checkpoint belongs to; None outside."""
    found = _IN_BLOCK.match(name)
    return int(found[1]) if found else None
