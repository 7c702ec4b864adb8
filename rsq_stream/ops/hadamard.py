"""Hadamard product of runs of columns on a CUDA device, in one pass over memory.

How the matrix is built, and the twin that runs everywhere, are in
``algorithm/rotation/hadamard.py``. Powers of two may go to the kernels of the optional
package ``fast-hadamard-transform``: it has them for CUDA only, and no wheel for most
systems.
"""

import importlib
import importlib.metadata
import math
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.ops.cuda.cubin_cache import Kernel
from rsq_stream.ops.cuda.launch import WARP, launch, output, shared_limit

_TYPES = (torch.float32, torch.bfloat16)
_WIDEST_DENSE = 64
"""The signs of a row of the dense factor are one mask of 64 bits."""
_LONGEST_POWER = 1 << 16
_CHUNK = 1024
"""Entries that a warp transforms by itself."""
_WARPS = 8
_SHARING_CHUNKS = 28
"""A block of more has an SM to itself, and takes twice the warps."""
_VECTOR_BYTES = 16
_PACKAGE = "fast-hadamard-transform"
_PACKAGE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_PACKAGE_LONGEST = 1 << 15
"""Longest row that the package's kernel takes."""


def fits(x_LN: Tensor, dense: int, power: int) -> bool:
    """Say whether the kernel takes runs of dense x power entries of this type."""
    return (
        x_LN.is_cuda
        and x_LN.dtype in _TYPES
        and dense <= _WIDEST_DENSE
        and power <= _LONGEST_POWER
        and _shared_bytes(_chunks(dense * power)) <= shared_limit(x_LN.device)
    )


def hadamard_kernel(
    x_LN: Float[Tensor, "L N"], dense_DD: Tensor, power: int
) -> Float[Tensor, "L N"]:
    """Compute ``x (I kron M kron S) / sqrt(D power)`` with ``kernels/hadamard.cu``.

    ``dense_DD`` is the int8 factor M, +-1, on the CPU; S is Sylvester's of order
    ``power``. bf16 is computed in fp32 and rounded once.
    """
    dense = dense_DD.shape[0]
    width = dense * power
    rows = x_LN.numel() // width
    per_block = _rows_per_block(width)
    made_LN = output(x_LN.shape, x_LN.dtype, x_LN.device)
    kernel = _kernel_of(dense_DD.numpy().tobytes(), dense, power, x_LN.dtype)
    grid = (-(-rows // per_block), 1, 1)
    arguments = (_aligned(x_LN), made_LN, rows, 1.0 / math.sqrt(width))
    launch(kernel, grid, WARP * _warps(_chunks(per_block * width)), arguments)
    return made_LN


@cache
def _kernel_of(entries: bytes, dense: int, power: int, dtype: torch.dtype) -> Kernel:
    """Name the kernel, once for each factor: its signs take as long as a product."""
    per_block = _rows_per_block(dense * power)
    defines = [
        f"LOG={power.bit_length() - 1}",
        f"DENSE={dense}",
        f"ROWS={per_block}",
        f"SIGNS={','.join(_masks(entries, dense))}",
    ]
    if dtype == torch.bfloat16:
        defines.append("BF16")
    shared_bytes = _shared_bytes(_chunks(per_block * dense * power))
    return Kernel("hadamard", "hadamard", tuple(defines), shared_bytes)


def _aligned(x_LN: Tensor) -> Tensor:
    """Return the tensor dense, and where the kernel's vectors can begin."""
    x_LN = x_LN.contiguous()
    return x_LN.clone() if x_LN.data_ptr() % _VECTOR_BYTES else x_LN


def _rows_per_block(width: int) -> int:
    return max(1, _WARPS * _CHUNK // width)  # of short runs, several


def _warps(chunks: int) -> int:
    return min(chunks, _WARPS) if chunks <= _SHARING_CHUNKS else 2 * _WARPS


def _chunks(entries: int) -> int:
    return -(-entries // _CHUNK)


def _shared_bytes(chunks: int) -> int:
    return 4 * _CHUNK * chunks


def _masks(entries: bytes, dense: int) -> list[str]:
    """Return each row's signs as a mask: bit d' is set where the int8 entry is -1."""
    rows = [entries[at : at + dense] for at in range(0, len(entries), dense)]
    masks = [sum((entry > 127) << at for at, entry in enumerate(row)) for row in rows]
    return [f"0x{mask:x}ull" for mask in masks]


@cache
def _package() -> ModuleType | None:
    """Import the optional package; None where it does not import.

    Looking for an absent one takes as long as a small product, so it is done once.
    """
    try:
        return importlib.import_module(_PACKAGE.replace("-", "_"))
    except ImportError:
        return None


def package_version() -> str:
    """Name the optional package's version for the plan, or its absence."""
    if _package() is None:
        return f"no {_PACKAGE}"
    return f"{_PACKAGE} {importlib.metadata.version(_PACKAGE)}"


def package_product(x_LN: Float[Tensor, "L N"]) -> Float[Tensor, "L N"] | None:
    """Compute ``x @ H / sqrt(N)``, H Sylvester's, with the package; None if it cannot.

    Its kernel takes CUDA tensors whose width is a power of two up to 32768.
    """
    width = x_LN.shape[1]
    if (
        not x_LN.is_cuda
        or x_LN.dtype not in _PACKAGE_TYPES
        or width & (width - 1)
        or width > _PACKAGE_LONGEST
    ):
        return None
    package = _package()
    if package is None:
        return None
    product: Tensor = package.hadamard_transform(x_LN, scale=1 / math.sqrt(width))
    return product
