"""Compile CUDA C++ to a cubin with NVRTC: no toolkit, no compiler, no device needed.

NVRTC and cuda-bindings come with CUDA builds of torch from 2.10 on. Elsewhere the
wheels ``cuda-bindings`` and ``nvidia-cuda-nvrtc`` are enough to compile.
"""

from types import ModuleType
from typing import Any

from rsq_stream.errors import KernelError

_OPTIONS = ("--std=c++17",)
"""Neither fast division nor fast functions: twins agree to the last bit, or nearly."""


def compiler_version() -> str:
    """Name NVRTC's version, which decides what it makes of a source.

    Raises
    ------
    KernelError
        NVRTC is not installed.
    """
    nvrtc = _bindings()
    return ".".join(str(part) for part in _checked(nvrtc, nvrtc.nvrtcVersion()))


def compile_cubin(
    name: str, source: str, defines: tuple[str, ...], architecture: str
) -> bytes:
    """Compile one source; ``defines`` as ``("BITS=3",)``, architecture ``sm_90``.

    Raises
    ------
    KernelError
        NVRTC is not installed, or does not take the source; the message holds its
        first complaint.
    """
    nvrtc = _bindings()
    options = [*_OPTIONS, f"--gpu-architecture={architecture}"]
    options += [f"-D{define}" for define in defines]
    made = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
    (program,) = _checked(nvrtc, made)
    try:
        done = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        if int(done[0]):
            raise KernelError(
                f"{name}.cu does not compile for {architecture} with"
                f" {' '.join(defines) or 'no defines'}: {_complaint(nvrtc, program)}"
            )
        size = int(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))[0])
        cubin = bytes(size)  # the call writes into it
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _bindings() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError(
            "NVRTC cannot be loaded, which compiles the CUDA kernels; a CUDA build of"
            " torch from 2.10 on brings it, or pip install cuda-bindings"
            " nvidia-cuda-nvrtc"
        ) from error
    module: ModuleType = nvrtc
    return module


def _complaint(nvrtc: ModuleType, program: Any) -> str:
    """Return the first line of the compiler's log that names an error."""
    size = int(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))[0])
    log = bytes(size)
    _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    lines = log.rstrip(b"\0").decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), "no reason given")


def _checked(nvrtc: ModuleType, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drop the status of a call that went well."""
    status, *values = answer
    if int(status):
        _, said = nvrtc.nvrtcGetErrorString(status)
        raise KernelError(f"NVRTC: {bytes(said).decode(errors='replace')}")
    return tuple(values)
