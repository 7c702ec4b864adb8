"""The E8P codebook: 2**16 points of E8 + 1/4, so 2 bits for each of 8 weights.

E8 holds the vectors of half-integers with an even sum. A codeword is such a vector
plus 1/4 or minus 1/4 in all coordinates (Tseng et al., QuIP#, arXiv 2402.04396); both
lie in E8 + 1/4, since 1/2 in all coordinates is in E8. The vectors are 256 patterns of
absolute values with all signs that make the sum even, which are 2**7:

- the 227 patterns of 1/2, 3/2, 5/2 with a squared norm of at most 10;
- 29 of the 56 with five 3/2 and three 1/2 (norm 12). Which 29 is a choice of our own:
  the places of the 1/2 are those of four triples, each turned round the circle of 8
  places, until there are 29, so that no coordinate is preferred.

Coordinates are multiples of 1/4 and are kept as digits: 0 .. 11 for (2 digit - 11) / 4.
An index has the sign of coordinate i < 7 in bit i (set for minus), the shift in bit 7
(set for minus 1/4) and the pattern in bits 8 to 15; the last sign follows.
"""

import functools
import itertools

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

WIDTH = 8
"""Weights of a codeword."""
DIGITS = 12
"""Values that a coordinate can have."""
_PATTERNS = 256
_AT_A_TIME = 1 << 21
"""Digits whose indices are looked for together: some 40 bytes are taken for each."""
_TRIPLES = ((0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 1, 5))


def digit_values() -> Float[Tensor, "L"]:
    """Return what each digit stands for: -11/4, -9/4, ... 11/4."""
    return (2 * torch.arange(DIGITS, dtype=torch.float32) - (DIGITS - 1)) / 4


@functools.cache
def halves() -> np.ndarray:
    """Return the places of the three 1/2 in each pattern of norm 12, ``[29, 3]``."""
    turned = [
        [(turn + place) % WIDTH for place in triple]
        for triple in _TRIPLES
        for turn in range(WIDTH)
    ]
    return np.array(turned[:29], dtype=np.int64)


@functools.cache
def patterns() -> np.ndarray:
    """Return the 256 patterns, ``[256, 8]`` fp32, by norm and then by their entries."""
    entries = itertools.product((0.5, 1.5, 2.5), repeat=WIDTH)
    every = np.array(list(entries), dtype=np.float32)
    norms = (every**2).sum(1)
    small = every[norms <= 10]
    order = np.argsort((small**2).sum(1), kind="stable")
    large = np.full((len(halves()), WIDTH), 1.5, dtype=np.float32)
    np.put_along_axis(large, halves(), np.float32(0.5), axis=1)
    return np.concatenate([small[order], large])


@functools.cache
def codeword_digits() -> UInt8[Tensor, "N C"]:
    """Return the digits of each of the 65536 codewords, by index."""
    index_N = np.arange(1 << 16)
    absolute_NC = patterns()[index_N >> 8]
    minus_NC = (index_N[:, None] >> np.arange(WIDTH)) & 1
    # The last sign makes the sum even: each minus changes the sum by an odd number.
    odd_N = absolute_NC.sum(1).astype(np.int64) & 1
    minus_NC[:, -1] = (minus_NC[:, :-1].sum(1) & 1) ^ odd_N
    vector_NC = np.where(minus_NC == 1, -absolute_NC, absolute_NC)
    shift_N = np.where(index_N >> 7 & 1, -0.25, 0.25)
    digit_NC = (4 * (vector_NC + shift_N[:, None]) + DIGITS - 1) / 2
    return torch.from_numpy(digit_NC.astype(np.uint8))


@functools.cache
def _pattern_numbers() -> Tensor:
    """Return a pattern's number by its entries as digits to the base 3; -1 for none."""
    found = torch.full((3**WIDTH,), -1, dtype=torch.int64)
    entry_NC = torch.from_numpy(patterns() - 0.5).long()
    found[entry_NC @ _places()] = torch.arange(_PATTERNS)
    return found


def _places() -> Tensor:
    return 3 ** torch.arange(WIDTH, dtype=torch.int64)


def to_indices(digit_OI: UInt8[Tensor, "O I"]) -> Int32[Tensor, "O N"]:
    """Return the index, 0 .. 65535, of each run of 8 digits, which must be a codeword.

    Raises
    ------
    ValueError
        Some are not.
    """
    rows = max(1, _AT_A_TIME // digit_OI.shape[1])
    return torch.cat([_to_indices(digit_RI) for digit_RI in digit_OI.split(rows)])


def _to_indices(digit_OI: Tensor) -> Tensor:
    outputs, inputs = digit_OI.shape
    quarter_ONC = 2 * digit_OI.reshape(outputs, -1, WIDTH).long() - (DIGITS - 1)
    # Of h + 1/4 four times the value is 3 modulo 4, of h - 1/4 it is 1.
    minus_ON = quarter_ONC[:, :, 0] % 4 == 1
    double_ONC = (quarter_ONC + torch.where(minus_ON, 1, -1)[:, :, None]) // 2
    entry_ONC = (double_ONC.abs() - 1).div(2, rounding_mode="floor").clamp(0, 2)
    number_ON = _pattern_numbers().to(digit_OI.device)[
        (entry_ONC * _places().to(digit_OI.device)).sum(-1)
    ]
    bit_C = 1 << torch.arange(WIDTH - 1, device=digit_OI.device)
    sign_ON = ((double_ONC[:, :, :-1] < 0) * bit_C).sum(-1)
    index_ON = (number_ON.clamp(min=0) << 8) + (minus_ON.long() << 7) + sign_ON
    if not torch.equal(to_digits(index_ON.to(torch.int32)), digit_OI):
        raise ValueError(f"{outputs} x {inputs} digits are not all codewords of E8P")
    return index_ON.to(torch.int32)


def to_digits(index_ON: Int32[Tensor, "O N"]) -> UInt8[Tensor, "O I"]:
    """Undo ``to_indices``; any index from 0 to 65535 is a codeword."""
    digit_NC = codeword_digits().to(index_ON.device)
    return digit_NC[index_ON.long()].flatten(1)
