"""What a GPU has free, and how much of it this process may take."""

import gc

import torch


def free_bytes(device: torch.device) -> int:
    """Return what the card has free for this process."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def cap(device: torch.device, limit_bytes: int) -> None:
    """Make the allocator refuse what goes beyond the limit, as if the card were full.

    The CUDA context lies outside the allocator, so the planner leaves room for it.
    """
    _, total = torch.cuda.mem_get_info(device)
    share = min(1.0, limit_bytes / total)
    with torch.cuda.device(device):  # it takes no "cuda" without a number
        torch.cuda.set_per_process_memory_fraction(share)


def peak_bytes(device: torch.device) -> int:
    """Return the most that tensors took since the last call, and begin anew."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(peak)


def give_back_device_memory() -> None:
    """Make the allocator give free blocks back, so that it can cut them anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
