"""Dense little-endian bit streams of 2 to 8 bits, in 32-bit words.

Row by row, code i takes the bits i b .. i b + b - 1 of the row's stream, lowest
bit first; the row is padded with zero bits to a whole word. This is the layout
of compressed-tensors >= 0.18 (``pack-quantized``) and, transposed, of GPTQ.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from rsq_stream.errors import KernelError
from rsq_stream.ops.cuda.cubin_cache import Kernel
from rsq_stream.ops.cuda.launch import launch, output

_WORD = 32
_THREADS = 128


def packed_words(codes: int, bits: int) -> int:
    """Return the 32-bit words that a row of codes takes: ceil(codes bits / 32)."""
    return -(-codes * bits // _WORD)


def pack(code_OI: UInt8[Tensor, "O I"], bits: int) -> Int32[Tensor, "O W"]:
    """Pack each row; codes must be below 2**bits. ``[[1, 2, 3]]`` at 2 bits is 57."""
    if code_OI.is_cuda:
        return pack_kernel(code_OI, bits)
    return pack_rows(code_OI, bits)


def pack_naive(code_OI: UInt8[Tensor, "O I"], bits: int) -> Int32[Tensor, "O W"]:
    """Do the same in torch, on any device."""
    rows, codes = code_OI.shape
    runs = -(-codes // _WORD)
    padded = torch.zeros(rows, runs * _WORD, dtype=torch.int64, device=code_OI.device)
    padded[:, :codes] = code_OI
    run_ORC = padded.view(rows, runs, _WORD)
    word_ORW = padded.new_zeros(rows, runs, bits)
    for index in range(_WORD):
        word, shift = divmod(index * bits, _WORD)
        word_ORW[:, :, word] |= run_ORC[:, :, index] << shift
        if shift + bits > _WORD:
            word_ORW[:, :, word + 1] |= run_ORC[:, :, index] >> (_WORD - shift)
    word_OW = word_ORW.view(rows, -1)[:, : packed_words(codes, bits)] & 0xFFFFFFFF
    return torch.where(word_OW >= 2**31, word_OW - 2**32, word_OW).to(torch.int32)


def unpack(
    word_OW: Int32[Tensor, "O W"], bits: int, codes: int
) -> UInt8[Tensor, "O I"]:
    """Undo ``pack``: give ``codes`` codes per row.

    Raises
    ------
    KernelError
        The rows have another number of words than so many codes take.
    """
    words = packed_words(codes, bits)
    if word_OW.shape[1] != words:
        raise KernelError(
            f"unpack: {codes} codes of {bits} bits are {words} words a row, not"
            f" {word_OW.shape[1]}"
        )
    if word_OW.is_cuda:
        return unpack_kernel(word_OW, bits, codes)
    return unpack_rows(word_OW, bits, codes)


def unpack_naive(
    word_OW: Int32[Tensor, "O W"], bits: int, codes: int
) -> UInt8[Tensor, "O I"]:
    """Do the same in torch, on any device."""
    rows, words = word_OW.shape
    runs = -(-codes // _WORD)
    padded = torch.zeros(rows, runs * bits, dtype=torch.int64, device=word_OW.device)
    padded[:, :words] = word_OW.to(torch.int64) & 0xFFFFFFFF
    word_ORW = padded.view(rows, runs, bits)
    run_ORC = padded.new_empty(rows, runs, _WORD)
    for index in range(_WORD):
        word, shift = divmod(index * bits, _WORD)
        value = word_ORW[:, :, word] >> shift
        if shift + bits > _WORD:
            value = value | word_ORW[:, :, word + 1] << (_WORD - shift)
        run_ORC[:, :, index] = value & (2**bits - 1)
    return run_ORC.view(rows, -1)[:, :codes].to(torch.uint8)


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
