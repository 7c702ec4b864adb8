"""What the compiled loops share that go through a block column by column."""

import numpy as np
import torch
from torch import Tensor

ROUND = np.float32(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds to even, for |x| < 2**22."""
TOGETHER = 32
"""Columns after which the later ones are brought up to date: their errors and the
targets of a column stay in the processor's first cache."""


def by_columns(matrix_RC: Tensor) -> np.ndarray:
    """Copy a matrix to columns that lie in rows, for loops along the rows."""
    copied: np.ndarray = matrix_RC.T.clone(
        memory_format=torch.contiguous_format
    ).numpy()
    return copied
