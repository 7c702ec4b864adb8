"""Factor one small block: A = R R^T with R upper triangular."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def factor_block(block_CC: Float[Tensor, "C C"]) -> Int[Tensor, ""]:
    """Overwrite a symmetric block by R, ``A = R R^T``, with zeros below its diagonal.

    Only the upper triangle is read. It is the library's Cholesky, of the block turned
    end to end. Gives -1, or the index of the first pivot (from the last row upward)
    that is not positive; the block is then spoiled. The answer stays where the block
    is: whoever looks at it on a GPU waits for it.
    """
    lower_CC, info = torch.linalg.cholesky_ex(block_CC.flip(0, 1))
    block_CC.copy_(lower_CC.flip(0, 1))
    return torch.where(info > 0, block_CC.shape[0] - info, -1)
