"""Fit a plan into the memory there is: units in flight, and where weights lie.

Nothing here decides a byte of the output.
"""

from dataclasses import dataclass, replace
from math import ceil

import psutil
import torch

from rsq_stream.config.execution_plan import StageMemory
from rsq_stream.config.run_options import RunOptions
from rsq_stream.errors import BudgetError
from rsq_stream.planning.memory.stages import StageMemoryModel
from rsq_stream.runtime.device_memory import free_bytes
from rsq_stream.runtime.host_memory import available_bytes

HOST_OVERHEAD_BYTES = 208 << 20
"""Libraries loaded after planning, threads, and what the allocator keeps between
passes: 90 MiB seen with one stream, 180 MiB with two."""
CONTEXT_BYTES = 512 << 20
"""The CUDA context with its libraries, which lies outside the allocator."""
DEVICE_OVERHEAD_BYTES = CONTEXT_BYTES + (256 << 20)
"""That, cuBLAS' workspace, and blocks that the allocator cannot join."""

FREE_SHARE = 0.8
"""Of free host memory, what a run without ``--ram`` takes."""


@dataclass(frozen=True, kw_only=True)
class MemoryLimits:
    """What this process may still take, and whether an option said so."""

    host_bytes: int
    host_stated: bool
    device_bytes: int
    device_stated: bool
    used_bytes: int
    """Host memory that it has taken already."""


def memory_limits(options: RunOptions, used_bytes: int | None = None) -> MemoryLimits:
    """Ask the machine for what ``--ram`` and ``--vram`` leave open.

    ``used_bytes`` are from an earlier time, where what came since is part of the plan.
    """
    used = psutil.Process().memory_info().rss if used_bytes is None else used_bytes
    host, device = options.ram_bytes, options.vram_bytes
    if host is None:
        host = used + int(available_bytes() * FREE_SHARE)
    if device is None:
        device = free_bytes(torch.device(options.device)) if options.on_gpu else 0
    return MemoryLimits(
        host_bytes=host - used,
        host_stated=options.ram_bytes is not None,
        device_bytes=device,
        device_stated=options.vram_bytes is not None,
        used_bytes=used,
    )


def fitted(
    memory: StageMemoryModel, room: MemoryLimits, *, may_keep: bool = True
) -> StageMemoryModel:
    """Return the plan with as many units in flight as fit, at most its own.

    Fewer units cost a GPU little; weights that are fetched for each use cost it more,
    so they come last. Where the host has no room for the solver's weights, a GPU ``may
    keep`` them.

    Raises
    ------
    BudgetError
        Not even one unit at a time fits; the message says what would do.
    """
    refusal = ""
    for streams in (False, True) if memory.on_gpu else (False,):
        for in_flight in range(memory.in_flight, 0, -1):
            tried = replace(memory, in_flight=in_flight, offloads_weights=streams)
            device, host = _device_shortage(tried, room), _host_shortage(tried, room)
            if host and not device and memory.on_gpu and may_keep and not streams:
                kept = keeping_weights(tried, room)
                tried, host = kept, _host_shortage(kept, room)
            if not device and not host:
                return tried
        # Where the GPU has room for the weights, the host should not take them.
        refusal = device or host
        if not device:
            break
    raise BudgetError(refusal)


def keeping_weights(memory: StageMemoryModel, room: MemoryLimits) -> StageMemoryModel:
    """Have the solver's weights stay on the GPU, where it has room for them.

    To host memory and back they take as long as some passes.
    """
    tried = replace(memory, keeps_solver_weights_on_gpu=True)
    return memory if _device_shortage(tried, room) else tried


def reading_ahead(memory: StageMemoryModel, room: MemoryLimits) -> StageMemoryModel:
    """Have the next block read while one computes, where the host has room for it.

    It comes before units that stay in memory: these are read beside the compute, while
    a block would be waited for.
    """
    tried = replace(memory, prefetches_blocks=True)
    need = max(made.host_bytes for made in tried.stages()) + HOST_OVERHEAD_BYTES
    return tried if need <= room.host_bytes else memory


def _device_shortage(memory: StageMemoryModel, room: MemoryLimits) -> str:
    """Say how much GPU memory would do; nothing where it fits."""
    tightest = max(memory.stages(), key=lambda made: made.device_bytes)
    need = tightest.device_bytes + DEVICE_OVERHEAD_BYTES
    if not memory.on_gpu or need <= room.device_bytes:
        return ""
    given = f"{room.device_bytes / 2**30:.2f}GiB"
    what = f"--vram {given}" if room.device_stated else f"{given} of free GPU memory"
    return _refusal(what, need, tightest)


def _host_shortage(memory: StageMemoryModel, room: MemoryLimits) -> str:
    """Say how much host memory would do.

    Without ``--ram`` one unit at a time is left to the host, which may have swap.
    """
    tightest = max(memory.stages(), key=lambda made: made.host_bytes)
    need = tightest.host_bytes + HOST_OVERHEAD_BYTES
    if need <= room.host_bytes or not (room.host_stated or memory.in_flight > 1):
        return ""
    given = room.host_bytes + room.used_bytes
    what = f"--ram {given / 2**30:.2f}GiB"
    return _refusal(what, room.used_bytes + need, tightest)


def _refusal(what: str, need: int, tightest: StageMemory) -> str:
    """Write the one line; the size that it names is rounded up, so that it does."""
    return (
        f"{what} is too little: this model needs"
        f" {ceil(100 * need / 2**30) / 100:.2f}GiB with one unit in flight"
        f" ({tightest.name})"
    )
