"""Pack codes into dense bit streams, and unpack them: a CUDA kernel and its CPU twin.

The layout, and the twins in plain torch, are in ``algorithm/packing.py``.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from rsq_stream.ops.cuda.cubin_cache import Kernel
from rsq_stream.ops.cuda.launch import launch, output

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


def pack_rows(code_OI: UInt8[Tensor, "O I"], bits: int) -> Int32[Tensor, "O W"]:
    """Pack each row on the CPU; allocates nothing but the words."""
    rows, codes = code_OI.shape
    word_OW = np.empty((rows, -(-codes * bits // _WORD)), dtype=np.uint32)
    _pack_rows(code_OI.contiguous().numpy(), bits, word_OW)
    return torch.from_numpy(word_OW.view(np.int32))


def unpack_rows(
    word_OW: Int32[Tensor, "O W"], bits: int, codes: int
) -> UInt8[Tensor, "O I"]:
    """Undo ``pack_rows``."""
    code_OI = np.empty((word_OW.shape[0], codes), dtype=np.uint8)
    _unpack_rows(word_OW.contiguous().numpy().view(np.uint32), bits, code_OI)
    return torch.from_numpy(code_OI)


@numba.njit(nogil=True, cache=True)
@no_type_check
def _pack_rows(  # pragma: no cover - compiled
    code: np.ndarray, bits: int, word: np.ndarray
) -> None:
    mask = np.uint64(0xFFFFFFFF)
    for r in range(code.shape[0]):
        held = np.uint64(0)
        filled = 0
        at = 0
        for c in range(code.shape[1]):
            held |= np.uint64(code[r, c]) << np.uint64(filled)
            filled += bits
            if filled >= 32:
                word[r, at] = np.uint32(held & mask)
                held >>= np.uint64(32)
                filled -= 32
                at += 1
        if filled > 0:
            word[r, at] = np.uint32(held & mask)


@numba.njit(nogil=True, cache=True)
@no_type_check
def _unpack_rows(  # pragma: no cover - compiled
    word: np.ndarray, bits: int, code: np.ndarray
) -> None:
    mask = np.uint64((1 << bits) - 1)
    for r in range(code.shape[0]):
        held = np.uint64(0)
        filled = 0
        at = 0
        for c in range(code.shape[1]):
            if filled < bits:
                held |= np.uint64(word[r, at]) << np.uint64(filled)
                filled += 32
                at += 1
            code[r, c] = np.uint8(held & mask)
            held >>= np.uint64(bits)
            filled -= bits
