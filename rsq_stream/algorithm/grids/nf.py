"""NormalFloat: levels at the quantiles of a normal distribution (QLoRA).

With delta = 0.9677083 the values are the standard normal quantiles of 2**(b-1) points
from 1 - delta to 1/2, the last left out, and of 2**(b-1) + 1 points from 1/2 to delta,
divided by that of delta: from -1 to 1 with an exact 0, one value more above than below
(Dettmers et al., arXiv 2305.14314; 4 bits are their NF4).
"""

import functools
import statistics
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.grids._table import TableGrid

_DELTA = 0.9677083


@functools.cache
def normal_values(bits: int) -> Float[Tensor, "L"]:
    """Return the 2**bits values, ascending; at 2 bits -1, 0, 0.3379, 1."""
    quantile = statistics.NormalDist().inv_cdf
    half = 1 << (bits - 1)
    below = [1 - _DELTA + (_DELTA - 0.5) * i / (half - 1) for i in range(half - 1)]
    above = [0.5 + (_DELTA - 0.5) * i / half for i in range(half + 1)]
    values = [quantile(share) for share in (*below, *above)]
    return torch.tensor(values, dtype=torch.float64).div(quantile(_DELTA)).float()


class NormalFloat(TableGrid):
    """The NormalFloat grid; a negative scale mirrors it, at no cost in the format."""

    title: ClassVar[str] = "NormalFloat"

    @property
    def values(self) -> Float[Tensor, "L"]:
        """The values of the codes, ascending from -1 to 1."""
        return normal_values(self.bits)


GRID = NormalFloat
