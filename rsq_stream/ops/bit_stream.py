"""Pack codes into dense bit streams, and unpack them, on a CUDA device.

The layout, and the twins that run everywhere, are in ``algorithm/packing.py``.
"""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from rsq_stream.ops.launch import launch, output
from rsq_stream.ops.library import Kernel

_WORD = 32
_THREADS = 128


def pack_kernel(code_OI: UInt8[Tensor, "O I"], bits: int) -> Int32[Tensor, "O W"]:
    """Pack each row with ``kernels/pack.cu``."""
    rows, codes = code_OI.shape
    words, runs = -(-codes * bits // _WORD), -(-codes // _WORD)
    word_OW = output((rows, words), torch.int32, code_OI.device)
    _run("pack", bits, (code_OI.contiguous(), word_OW), (rows, codes, words, runs))
    return word_OW


def unpack_kernel(
    word_OW: Int32[Tensor, "O W"], bits: int, codes: int
) -> UInt8[Tensor, "O I"]:
    """Undo ``pack_kernel``."""
    rows, words = word_OW.shape
    code_OI = output((rows, codes), torch.uint8, word_OW.device)
    sizes = (rows, codes, words, -(-codes // _WORD))
    _run("unpack", bits, (word_OW.contiguous(), code_OI), sizes)
    return code_OI


def _run(
    function: str,
    bits: int,
    tensors: tuple[Tensor, Tensor],
    sizes: tuple[int, int, int, int],
) -> None:
    rows, _, _, runs = sizes
    kernel = Kernel("pack", function, (f"BITS={bits}",))
    launch(kernel, (-(-rows * runs // _THREADS), 1, 1), _THREADS, (*tensors, *sizes))
