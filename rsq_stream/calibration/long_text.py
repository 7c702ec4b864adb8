"""The tokens of a long text, a piece at a time.

A tokenizer keeps some 150 bytes for each character of what it is given: of the 50
million characters of a data set that would be more than most models take here.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

PIECE = 1 << 19
"""Characters that are tokenized at a time, at most."""
_WORD_END = re.compile(r"(?<=[^\W_])(?=\s)")


def tokens_of(text: str, tokenizer: Callable[..., Any]) -> Int[Tensor, "T"]:
    """Return a text's tokens in int32, with those that the tokenizer puts before it.

    A piece ends where a word does: there the patterns of byte-level tokenizers (GPT-2,
    Llama 3, Qwen) divide a text in any case, and the tokens are those of the whole.
    (Not where a line ends: GPT-2's takes the last of several line ends by itself.)
    Others may put a space before each piece.
    """
    parts = [
        torch.tensor(
            tokenizer(piece, add_special_tokens=not number, verbose=False)["input_ids"],
            dtype=torch.int32,
        )
        for number, piece in enumerate(_pieces(text))
    ]
    return torch.cat(parts)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end = _cut(text, start)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int) -> int:
    """Find the last word's end in the second half of what a piece may have."""
    middle = start + PIECE // 2
    found = [match.start() for match in _WORD_END.finditer(text, middle, start + PIECE)]
    return found[-1] if found else start + PIECE
