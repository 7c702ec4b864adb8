"""Factors of a product in two 16-bit terms, for tensor cores: x = high + low.

Of fp32 both bf16 terms keep 16 bits. Their products with bf16 are exact in fp32, and
the sums are those of fp32. fp16 ends at 65504, which a token's weight times a massive
activation may exceed: then both terms are of x divided by a power of two.
"""

from math import ceil, isfinite, log2
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.ops.cuda.cubin_cache import Kernel
from rsq_stream.ops.cuda.launch import by_rows, launch, output

_THREADS = 256


class Terms(NamedTuple):
    """x = unit (high + low)."""

    high_TC: Float[Tensor, "T C"]
    low_TC: Float[Tensor, "T C"]
    unit: float
    """A power of two; 1 unless x is beyond the type."""


def two_terms(
    x_TC: Float[Tensor, "T C"],
    kind: torch.dtype,
    weight_T: Float[Tensor, "T"] | None = None,
) -> Terms:
    """Return w x in two terms of a 16-bit type, w the fp32 weights of the rows."""
    if x_TC.is_cuda and kind == torch.bfloat16 and x_TC.dtype != torch.float16:
        return two_terms_kernel(x_TC, weight_T)
    return two_terms_naive(x_TC, kind, weight_T)


def two_terms_kernel(
    x_TC: Float[Tensor, "T C"], weight_T: Float[Tensor, "T"] | None = None
) -> Terms:
    """Do the same in bf16 with ``kernels/two_terms.cu``, to the last bit."""
    rows, columns = x_TC.shape
    x_TC = by_rows(x_TC)
    high_TC, low_TC = (
        output((rows, columns), torch.bfloat16, x_TC.device) for _ in range(2)
    )
    launch(
        Kernel("two_terms", "two_terms", ("BF16",) if x_TC.element_size() == 2 else ()),
        (rows, 1, 1),
        _THREADS,
        (
            *(x_TC, x_TC.stride(0)),
            0 if weight_T is None else weight_T.contiguous(),
            *(high_TC, low_TC, rows, columns),
        ),
    )
    return Terms(high_TC, low_TC, 1.0)


def two_terms_naive(
    x_TC: Float[Tensor, "T C"],
    kind: torch.dtype,
    weight_T: Float[Tensor, "T"] | None = None,
) -> Terms:
    """Do the same step by step, on any device."""
    weighted_TC = x_TC.float()
    if weight_T is not None:
        weighted_TC = weight_T[:, None] * weighted_TC
    unit = _unit(weighted_TC) if kind == torch.float16 else 1.0
    if unit > 1:
        weighted_TC = weighted_TC / unit
    high_TC = weighted_TC.to(kind)
    return Terms(high_TC, (weighted_TC - high_TC.float()).to(kind), unit)


def _unit(x_TC: Float[Tensor, "T C"]) -> float:
    """Return what to divide fp32 values by for fp16 to hold them; waits for a GPU."""
    low, high = torch.aminmax(x_TC)
    largest = max(-float(low), float(high))
    limit = torch.finfo(torch.float16).max
    if largest <= limit or not isfinite(largest):
        return 1.0
    return 2.0 ** ceil(log2(largest / limit))


def add_product(
    sum_RC: Float[Tensor, "R C"],
    left_RT: Float[Tensor, "R T"],
    right_TC: Float[Tensor, "T C"],
    unit: float,
) -> None:
    """Add unit left @ right of 16-bit factors to an fp32 sum, in place (CUDA alone)."""
    torch.addmm(
        sum_RC, left_RT, right_TC, alpha=unit, out_dtype=torch.float32, out=sum_RC
    )
