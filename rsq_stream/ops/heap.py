"""Have large tensors go back to the system when they are freed.

glibc raises its threshold for separate mappings up to 32 MiB as blocks are freed;
from then on activations live in the heap, between small objects that stay, and the
heap grows with every pass. A fixed threshold keeps host memory flat.
"""

import ctypes

_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Fix the allocator's threshold for this process; does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
