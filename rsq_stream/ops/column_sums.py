"""Attention mass that each key receives, summed over heads and queries.

s_t = sum over heads and queries i >= t of softmax_i(q_i . k / sqrt(K))[t]. A few
queries at a time: the T x T map never exists. All sums of a sequence add up to
heads x tokens, whatever the keys.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.ops.cuda.cubin_cache import Kernel
from rsq_stream.ops.cuda.launch import launch, output

QUERIES = 128
"""Queries that the twin takes at a time."""
_TILE = 64
"""Queries or keys of the kernel's tiles."""
_THREADS = 256
_TENSOR_TILE = 128
"""Queries or keys that a block of the bf16 kernel holds."""
_WIDEST = 256
"""Head width up to which it holds them in registers."""
_PRODUCT = 16
"""Its head widths are filled up to multiples of this."""


def column_sums(
    query_BHTK: Float[Tensor, "B H T K"],
    key_BGTK: Float[Tensor, "B G T K"],
    scaling: float,
    window: int | None = None,
) -> Float[Tensor, "B T"]:
    """Sum causal softmax attention over queries and heads, per key, in fp32.

    ``G`` KV heads serve H query heads (H a multiple of G). With ``window`` a
    query sees only that many latest keys, itself included.
    """
    if query_BHTK.is_cuda:
        return column_sums_kernel(query_BHTK, key_BGTK, scaling, window)
    return column_sums_naive(query_BHTK, key_BGTK, scaling, window)


def column_sums_kernel(
    query_BHTK: Float[Tensor, "B H T K"],
    key_BGTK: Float[Tensor, "B G T K"],
    scaling: float,
    window: int | None = None,
) -> Float[Tensor, "B T"]:
    """Do the same with ``kernels/column_sums.cu``; heads are added up in order.

    Of bf16 with tensor cores, by ``kernels/column_sums_bf16.cu``.
    """
    sequences, heads, tokens, width = query_BHTK.shape
    kinds = {query_BHTK.dtype, key_BGTK.dtype}
    if kinds == {torch.bfloat16} and width <= _WIDEST:
        query, key = _aligned(query_BHTK), _aligned(key_BGTK)
        defines: tuple[str, ...] = (f"PAD={-(-width // _PRODUCT) * _PRODUCT}",)
        source, tile = "column_sums_bf16", _TENSOR_TILE
    else:
        query, key = query_BHTK.float().contiguous(), key_BGTK.float().contiguous()
        source, tile, defines = "column_sums", _TILE, ()
    shape = (sequences, heads, tokens)
    # Of each query what its scores' largest is, and what their exponentials add up to.
    largest, total, sums_BHT = (
        output(shape, torch.float32, query.device) for _ in range(3)
    )
    grid = (-(-tokens // tile), heads, sequences)
    sizes = (heads, key.shape[1], tokens, width, float(scaling), window or 0)
    for function, made in (
        ("row_bounds", (largest, total)),
        ("column_sums", (largest, total, sums_BHT)),
    ):
        kernel = Kernel(source, function, defines)
        launch(kernel, grid, _THREADS, (query, key, *made, *sizes))
    return sums_BHT.sum(dim=1)


def _aligned(x: Tensor) -> Tensor:
    """Return a dense tensor that begins at a multiple of 16 bytes, or a copy."""
    dense = x.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()


def column_sums_naive(
    query_BHTK: Float[Tensor, "B H T K"],
    key_BGTK: Float[Tensor, "B G T K"],
    scaling: float,
    window: int | None = None,
) -> Float[Tensor, "B T"]:
    """Do the same tile by tile of queries, on any device."""
    sequences, _, tokens, _ = query_BHTK.shape
    query = query_BHTK.unflatten(1, (key_BGTK.shape[1], -1))  # by the key's head
    key = key_BGTK[:, :, None].float()
    sums_BT = query_BHTK.new_zeros((sequences, tokens), dtype=torch.float32)
    position_T = torch.arange(tokens, device=query.device)
    for start in range(0, tokens, QUERIES):
        end = min(start + QUERIES, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        scaled = query[:, :, :, start:end].float() * scaling
        score = scaled @ key[..., first:end, :].mT
        # Keys before the tile are seen by all its queries: mask only where need be.
        masked = start - first if window is None else 0
        distance = position_T[start:end, None] - position_T[first + masked : end]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        score[..., masked:].masked_fill_(hidden, float("-inf"))
        sums_BT[:, first:end] += score.softmax(dim=-1).sum(dim=(1, 2, 3))
    return sums_BT
