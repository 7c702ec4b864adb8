"""Dense little-endian bit streams of 2 to 8 bits, in 32-bit words.

Row by row, code i takes the bits i b .. i b + b - 1 of the row's stream, lowest
bit first; the row is padded with zero bits to a whole word. This is the layout
of compressed-tensors >= 0.18 (``pack-quantized``) and, transposed, of GPTQ.
"""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from rsq_stream.errors import KernelError
from rsq_stream.ops.pack import pack_kernel, pack_rows, unpack_kernel, unpack_rows

_WORD = 32


def packed_words(codes: int, bits: int) -> int:
    """Give the 32-bit words that a row of codes takes: ceil(codes bits / 32)."""
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
