"""Rounded activations as a textbook would write them, on a model of transformers.

Shares no code with the package: float64, one group of one token at a time, a dense
Hadamard matrix, attention maps in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "textbook"


def levels(x_C: Tensor, bits: int, *, symmetric: bool, clip: float) -> Tensor:
    """One group of one token, float64."""
    x_C = x_C.double()
    if not bool(x_C.any()):
        return x_C
    zero = 0
    if symmetric:
        scale = clip * float(x_C.abs().max()) / (2 ** (bits - 1) - 1)
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        low = clip * min(float(x_C.min()), 0.0)
        high = clip * max(float(x_C.max()), 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = round(-low / scale)
        least, most = 0, 2**bits - 1
    code_C = ((x_C / scale).round() + zero).clamp(least, most)
    return torch.mul(code_C - zero, scale)


def rounded(x: Tensor, bits: int, size: int, *, symmetric: bool, clip: float) -> Tensor:
    """All groups of all tokens, in x's type."""
    size = x.shape[-1] if size == -1 else size
    groups = x.reshape(-1, size)
    made = [levels(x_C, bits, symmetric=symmetric, clip=clip) for x_C in groups]
    return torch.stack(made).reshape(x.shape).to(x)


def hadamard(order: int) -> Tensor:
    """Sylvester's matrix over the root of its order: (-1)**(bits that i, j share)."""
    signs = [
        [(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)
    ]
    matrix: Tensor = torch.tensor(signs, dtype=torch.float64) / order**0.5
    return matrix


@dataclass
class Served:
    """How a model is served, and what its linears read while it was."""

    activation_bits: int = 16
    activation_group_size: int = -1
    activation_symmetric: bool = True
    activation_clip: float = 1.0
    kv_bits: int = 16
    kv_symmetric: bool = True
    kv_clip: float = 1.0
    seen: dict[str, Tensor] = field(default_factory=dict)
    """Inputs by the name of the linear, of all calls end to end."""
    received: list[Tensor] = field(default_factory=list)
    """Attention that each token receives, ``[B, T]`` by block."""

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        del attention_mask
        q, k, v = query.double(), key.double(), value.double()
        if self.kv_bits < 16:
            grid: Any = {"symmetric": self.kv_symmetric, "clip": self.kv_clip}
            matrix_KK = hadamard(q.shape[-1])
            q, k = q @ matrix_KK, k @ matrix_KK
            k = rounded(k, self.kv_bits, -1, **grid)
            v = rounded(v, self.kv_bits, -1, **grid)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        score_BHTT = q @ k.mT * scaling
        future_TT = torch.ones_like(score_BHTT[0, 0], dtype=torch.bool).triu(1)
        map_BHTT = score_BHTT.masked_fill(future_TT, -torch.inf).softmax(-1)
        self.received.append(map_BHTT.sum((1, 2)))
        return (map_BHTT @ v).transpose(1, 2).to(query), None

    def input(self, name: str, x: Tensor) -> Tensor:
        if self.activation_bits < 16:
            x = rounded(
                x,
                self.activation_bits,
                self.activation_group_size,
                symmetric=self.activation_symmetric,
                clip=self.activation_clip,
            )
        self.seen[name] = x
        return x


@contextmanager
def serving(model: Any, served: Served) -> Iterator[Served]:
    """Round what all linears of the blocks read, and K and V, for a while."""
    AttentionInterface.register(NAME, served.attention)
    model.set_attn_implementation(NAME)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":

            def hook(_: Any, args: tuple[Tensor], name: str = name) -> Any:
                return (served.input(name, args[0]),)

            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield served
    finally:
        for handle in handles:
            handle.remove()
