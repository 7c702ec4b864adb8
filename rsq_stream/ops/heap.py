"""Give memory that is free in the allocator's heap back to the system.

Under glibc's threshold (up to 32 MiB, by what was freed) tensors lie in the heap,
between small objects that stay; what a pass frees is then not what the next one can
use, and the heap grows from pass to pass.
"""

import ctypes


def give_back_free_memory() -> None:
    """Have the allocator return its free pages; does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
