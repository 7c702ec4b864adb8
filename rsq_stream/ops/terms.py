"""Factors of a product in two 16-bit terms, for tensor cores: x = high + low.

Of fp32 both bf16 terms keep 16 bits. Their products with bf16 are exact in fp32, and
the sums are those of fp32.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.ops.launch import by_rows, launch, output
from rsq_stream.ops.library import Kernel

_THREADS = 256

Terms = tuple[Float[Tensor, "T C"], Float[Tensor, "T C"]]


def two_terms(
    x_TC: Float[Tensor, "T C"],
    kind: torch.dtype,
    weight_T: Float[Tensor, "T"] | None = None,
) -> Terms:
    """Give w x in two terms of a 16-bit type, w the fp32 weights of the rows."""
    if x_TC.is_cuda and kind == torch.bfloat16 and x_TC.dtype != torch.float16:
        return two_terms_kernel(x_TC, weight_T)
    return two_terms_naive(x_TC, kind, weight_T)


def two_terms_kernel(
    x_TC: Float[Tensor, "T C"], weight_T: Float[Tensor, "T"] | None = None
) -> Terms:
    """Do the same in bf16 with ``kernels/terms.cu``, to the last bit."""
    rows, columns = x_TC.shape
    x_TC = by_rows(x_TC)
    high_TC, low_TC = (
        output((rows, columns), torch.bfloat16, x_TC.device) for _ in range(2)
    )
    launch(
        Kernel("terms", "two_terms", ("BF16",) if x_TC.element_size() == 2 else ()),
        (rows, 1, 1),
        _THREADS,
        (
            *(x_TC, x_TC.stride(0)),
            0 if weight_T is None else weight_T.contiguous(),
            *(high_TC, low_TC, rows, columns),
        ),
    )
    return high_TC, low_TC


def two_terms_naive(
    x_TC: Float[Tensor, "T C"],
    kind: torch.dtype,
    weight_T: Float[Tensor, "T"] | None = None,
) -> Terms:
    """Do the same step by step, on any device."""
    weighted_TC = x_TC.float()
    if weight_T is not None:
        weighted_TC = weight_T[:, None] * weighted_TC
    high_TC = weighted_TC.to(kind)
    return high_TC, (weighted_TC - high_TC.float()).to(kind)


def add_product(
    sum_RC: Float[Tensor, "R C"],
    left_RT: Float[Tensor, "R T"],
    right_TC: Float[Tensor, "T C"],
) -> None:
    """Add left @ right of 16-bit factors to a sum in fp32, in place (CUDA alone)."""
    torch.addmm(sum_RC, left_RT, right_TC, out_dtype=torch.float32, out=sum_RC)
