"""Which device computes, with how many threads, and what its bits depend on."""

import dataclasses
import importlib.metadata
import os
import platform

import psutil
import torch

from rsq_stream.config.run_options import RunOptions
from rsq_stream.errors import UsageError
from rsq_stream.events import Listener, Notice
from rsq_stream.ops.hadamard import package_version
from rsq_stream.planning.memory.fit import CONTEXT_BYTES
from rsq_stream.runtime.device_memory import cap, free_bytes


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


def pick_device(wanted: str | None, *, imagined: bool = False) -> str:
    """Return the device: as asked and checked, else CUDA where there is one.

    An ``imagined`` one is CUDA, here or not.

    Raises
    ------
    UsageError
        No device of that name is here.
    """
    if wanted is None or (wanted == "cuda" and imagined):
        return "cuda" if imagined or torch.cuda.is_available() else "cpu"
    known = ["cpu"]
    if torch.cuda.is_available():
        known += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if wanted not in known:
        raise UsageError(
            f"--device must be one of {', '.join(known)} on this machine, not {wanted}"
        )
    return wanted


def make_deterministic() -> None:
    """Make CUDA compute the same bits each time; call it before the first product."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def pick_workers(wanted: int | None, device: str) -> int:
    """Return the threads: as asked, else one with a GPU, else the cores there are."""
    if wanted is not None:
        return wanted
    return 1 if device.startswith("cuda") else cores()


def cores() -> int:
    """Count the physical cores, no more than this process may use."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def within_card(options: RunOptions, listener: Listener) -> RunOptions:
    """Lower the GPU memory of a run to what its card has free, and say so.

    Others may be on the card.
    """
    # What is free lies beside this process's own context, which --vram is about too.
    most = free_bytes(torch.device(options.device)) + CONTEXT_BYTES
    if options.vram_bytes is None or options.vram_bytes <= most:
        return options
    given, left = (f"{size / 2**30:.2f} GiB" for size in (options.vram_bytes, most))
    text = f"--vram {given}: the card has {left} left, so that is planned for"
    listener(Notice(text=text, is_warning=True))
    return dataclasses.replace(options, vram_bytes=most)


def limit_to_card(options: RunOptions) -> None:
    """Cap what the allocator takes of a GPU; without ``vram`` lift an earlier cap."""
    if not (options.on_gpu and torch.cuda.is_available()):
        return
    device = torch.device(options.device)
    limit = torch.cuda.mem_get_info(device)[1]
    if options.vram_bytes is not None:
        limit = options.vram_bytes - CONTEXT_BYTES
    cap(device, limit)
