"""A tensor of an output, known before it exists."""

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output, known before it exists."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize
