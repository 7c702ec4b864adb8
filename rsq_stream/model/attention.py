"""One attention function for transformers' layers: causal, tiled, with column sums.

transformers looks the function up by name, so its own layers run unchanged. The
keyword ``column_sums`` asks for the attention each key receives in place of the
attention's output; it comes back where a layer returns its attention weights. The
block's ``quantizer`` rounds K and V here, where RoPE is behind them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rsq_stream.model.activation_quantizer import AS_COMPUTED, ActivationQuantizer
from rsq_stream.ops.column_sums import column_sums as sum_columns

NAME = "rsq_stream"
_QUERIES = 512
"""Queries per tile where a sliding window needs a mask."""


def attention(
    module: nn.Module,
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    *,
    sliding_window: int | None = None,
    column_sums: bool = False,
    quantizer: ActivationQuantizer = AS_COMPUTED,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend causally; gives ``[B, T, H, K]`` and, if asked, column sums ``[B, T]``.

    Whole sequences without padding: ``attention_mask`` is not looked at. With
    ``column_sums`` the output is not computed; a placeholder of zeros stands in.
    """
    scaling = query_BHTK.shape[-1] ** -0.5 if scaling is None else scaling
    query_BHTK, key_BGTK = quantizer.keys(query_BHTK, key_BGTK)
    tokens = query_BHTK.shape[2]
    window = sliding_window if sliding_window and sliding_window < tokens else None
    if column_sums:
        placeholder = query_BHTK.new_zeros(()).expand(query_BHTK.shape)
        sums_BT = sum_columns(query_BHTK, key_BGTK, scaling, window)
        return placeholder.transpose(1, 2), sums_BT
    value_BGTK = quantizer.values(value_BGTK)
    if window is None:
        output = scaled_dot_product_attention(
            query_BHTK,
            key_BGTK,
            value_BGTK,
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
    else:
        output = _windowed(
            query_BHTK, key_BGTK, value_BGTK, scaling=scaling, window=window
        )
    return output.transpose(1, 2), None


def _windowed(
    query_BHTK: Tensor,
    key_BGTK: Tensor,
    value_BGTK: Tensor,
    *,
    scaling: float,
    window: int,
) -> Tensor:
    """Attend to the latest ``window`` keys only, some queries at a time."""
    tokens = query_BHTK.shape[2]
    position_T = torch.arange(tokens, device=query_BHTK.device)
    parts = []
    for start in range(0, tokens, _QUERIES):
        end = min(start + _QUERIES, tokens)
        first = max(0, start - window + 1)
        distance = position_T[start:end, None] - position_T[first:end]
        parts.append(
            scaled_dot_product_attention(
                query_BHTK[:, :, start:end],
                key_BGTK[:, :, first:end],
                value_BGTK[:, :, first:end],
                attn_mask=(distance >= 0) & (distance < window),
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2)


AttentionInterface.register(NAME, attention)
