"""What of a machine the bits of a run depend on."""

import importlib.metadata
import platform

import torch

from rsq_stream.ops.hadamard import package_version


def device_kind(device: torch.device) -> str:
    """Name the processor and the library versions that the bits depend on."""
    torch_version = importlib.metadata.version("torch")
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"cuda, of which there is none here, torch {torch_version}"
    if device.type == "cuda":
        made = torch.cuda.get_device_properties(device)
        return (
            f"cuda {made.major}.{made.minor}, {made.multi_processor_count}"
            f" multiprocessors, torch {torch_version}, {package_version()}"
        )
    blas = "mkl" if torch.backends.mkl.is_available() else "openblas"
    numba_version = importlib.metadata.version("numba")
    level = torch.backends.cpu.get_cpu_capability()
    return (
        f"cpu {platform.machine()} {level}, torch {torch_version} {blas},"
        f" numba {numba_version}"
    )
