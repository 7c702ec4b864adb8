"""Launch a kernel on torch's current stream, through the CUDA driver.

Whole numbers travel as 64-bit integers, fractions as fp32, tensors as pointers to
their first element: a face checks types and layout before it launches.
"""

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rsq_stream.errors import KernelError
from rsq_stream.ops.cuda.cubin_cache import Kernel, cubin

Argument = Tensor | int | float
LaunchGrid = tuple[int, int, int]

_GRID_LIMIT = (2**31 - 1, 65535, 65535)
_MOST_IN_REGISTERS = 256
WARP = 32
ROWS_PER_BLOCK = 4
"""Rows, one a warp, of the kernels that walk along rows."""
_PLAIN_SHARED_BYTES = 48 * 2**10
"""More than this a kernel must ask for."""


def output(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Allocate what a kernel will fill; tests poison it."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def launch(
    kernel: Kernel, grid: LaunchGrid, threads: int, arguments: Sequence[Argument]
) -> None:
    """Put one kernel on the current stream of the tensors' device.

    Raises
    ------
    KernelError
        The grid is too large, tensors lie on several devices, or the driver refuses.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    devices = {value.device for value in tensors}
    if len(devices) != 1 or not tensors[0].is_cuda:
        names = sorted(str(device) for device in devices)
        raise KernelError(f"{kernel}: tensors must be on one CUDA device, not {names}")
    check_grid(kernel, grid)
    if 0 in grid:
        return
    device = tensors[0].device
    values = packed(arguments)
    pointers = (ctypes.c_void_p * len(values))(*(map(ctypes.addressof, values)))
    with _current(device):
        driver, function = _loaded(kernel, torch.cuda.current_device())
        stream = torch.cuda.current_stream().cuda_stream
        _checked(
            driver,
            f"{kernel} on a grid of {grid}",
            driver.cuLaunchKernel(
                function,
                *grid,
                *(threads, 1, 1),
                kernel.shared_bytes,
                stream,
                ctypes.addressof(pointers),
                0,
            ),
        )


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device current, if it is not: that takes as long as a launch."""
    if device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def packed(arguments: Sequence[Argument]) -> list[Any]:
    """Return each argument as the C value that its kernel declares."""
    made: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            made.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, float):
            made.append(ctypes.c_float(value))
        else:
            made.append(ctypes.c_longlong(value))
    return made


def by_rows(matrix: Tensor) -> Tensor:
    """Return a matrix whose rows are dense, whatever lies between them."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def chunks_of(kernel: str, what: str, count: int) -> tuple[str, ...]:
    """Say how many chunks of 32 a warp holds in registers.

    Raises
    ------
    KernelError
        There are more than 256, or none.
    """
    if not 1 <= count <= _MOST_IN_REGISTERS:
        raise KernelError(
            f"{kernel}: 1 to {_MOST_IN_REGISTERS} {what} at a time, not {count}"
        )
    return (f"CHUNKS={-(-count // WARP)}",)


def tabled(table: object | None) -> tuple[str, ...]:
    """Say whether codes stand for a table's values, not for whole numbers."""
    return () if table is None else ("TABLE",)


def check_grid(kernel: Kernel, grid: LaunchGrid) -> None:
    """Refuse a grid that no device takes."""
    if any(size > limit for size, limit in zip(grid, _GRID_LIMIT, strict=True)):
        raise KernelError(f"{kernel}: a grid of {grid} is beyond {_GRID_LIMIT}")


def architecture_of(device: int) -> str:
    """Name the architecture that kernels for a device are compiled for."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def shared_limit(device: torch.device) -> int:
    """Return the shared memory, in bytes, that a block may ask for."""
    return _shared_limit(device.index or 0)


@cache
def _shared_limit(device: int) -> int:
    from cuda.bindings import driver

    torch.cuda.current_stream(device).synchronize()  # the driver is set up by it
    attribute = driver.CUdevice_attribute
    wanted = attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    found = driver.cuDeviceGetAttribute(wanted, device)
    return int(_checked(driver, "shared memory of a block", found)[0])


@cache
def _loaded(kernel: Kernel, device: int) -> tuple[ModuleType, Any]:
    """Compile or fetch, load into torch's context of the device, find the function."""
    from cuda.bindings import driver

    what = f"{kernel} for {architecture_of(device)}"
    image = cubin(kernel, architecture_of(device))
    torch.cuda.current_stream(device).synchronize()  # makes torch's context current
    (module,) = _checked(driver, what, driver.cuModuleLoadData(image))
    found = driver.cuModuleGetFunction(module, kernel.function.encode())
    (function,) = _checked(driver, what, found)
    if kernel.shared_bytes > _PLAIN_SHARED_BYTES:
        attribute = driver.CUfunction_attribute
        wanted = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        done = driver.cuFuncSetAttribute(function, wanted, kernel.shared_bytes)
        _checked(driver, what, done)
    module_type: ModuleType = driver
    return module_type, function


def _checked(driver: ModuleType, what: str, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drop the status of a call that went well; otherwise say it in CUDA's words."""
    status, *values = answer
    if int(status):
        _, said = driver.cuGetErrorString(status)
        words = bytes(said).decode(errors="replace") if said else f"error {status}"
        raise KernelError(f"{what}: {words}")
    return tuple(values)
