"""The optional fast Walsh-Hadamard kernel, where its package imports.

``fast-hadamard-transform`` has CUDA kernels only and no wheel for most systems; without
it the dense Kronecker products of ``algorithm/rotation/hadamard.py`` do the same.
"""

import importlib
import importlib.metadata
import math
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

_PACKAGE = "fast-hadamard-transform"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 1 << 15
"""Longest row that the package's kernel takes."""


@cache
def package() -> ModuleType | None:
    """Give the package, None where it does not import.

    Looking for an absent one takes as long as a small product, so it is done once.
    """
    try:
        return importlib.import_module(_PACKAGE.replace("-", "_"))
    except ImportError:
        return None


def package_version() -> str:
    """Name the package's version for the plan, or its absence."""
    if package() is None:
        return f"no {_PACKAGE}"
    return f"{_PACKAGE} {importlib.metadata.version(_PACKAGE)}"


def walsh_product(x_LN: Float[Tensor, "L N"]) -> Float[Tensor, "L N"] | None:
    """Compute ``x @ H / sqrt(N)``, H Sylvester's, with the kernel; None if it cannot.

    The kernel takes CUDA tensors whose width is a power of two up to 32768.
    """
    width = x_LN.shape[1]
    if (
        not x_LN.is_cuda
        or x_LN.dtype not in _TYPES
        or width & (width - 1)
        or width > _LARGEST
    ):
        return None
    found = package()
    if found is None:
        return None
    product: Tensor = found.hadamard_transform(x_LN, scale=1 / math.sqrt(width))
    return product
