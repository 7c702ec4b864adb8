"""Tensors that are kept for long, in pages of their own and not in the heap.

Up to its threshold (some MiB, by what was freed) the allocator lays tensors into its
heap. What stays there, a tensor or only the small object behind one, between what a
pass allocates and gives back, leaves holes that nothing else fits into: units in memory
have then taken three times their size. So all of them lie in one mapping.
"""

import mmap
import threading
from contextlib import suppress

import torch
from torch import Tensor

_Shape = tuple[torch.dtype, tuple[int, ...]]


class TensorArena:
    """Tensors by number, each in pages of one mapping, which come and go with them.

    Example
    -------
    >>> pages = TensorArena(2, 12)
    >>> pages.put(1, torch.arange(3.0))
    >>> pages.get(1), 0 in pages
    (tensor([0., 1., 2.]), False)
    """

    def __init__(self, count: int, most_bytes: int) -> None:
        """Make room for tensors 0 to ``count - 1`` of at most so many bytes each."""
        self._stride = -(-most_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._size = count * self._stride
        self._mapping: mmap.mmap | None = None
        self._kept: dict[int, _Shape] = {}
        self._making = threading.Lock()

    def __contains__(self, number: int) -> bool:
        """Whether a tensor is kept."""
        return number in self._kept

    def put(self, number: int, x: Tensor) -> None:
        """Keep a copy of a tensor."""
        with self._making:
            if self._mapping is None:
                # Pages are the system's until they are written to.
                kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                self._mapping = mmap.mmap(-1, self._size, flags=kind)
                with suppress(OSError):  # advice; a kernel may have no such pages
                    self._mapping.madvise(mmap.MADV_HUGEPAGE)
        kept = x.dtype, tuple(x.shape)
        self._view(self._mapping, number, kept).copy_(x)
        self._kept[number] = kept

    def get(self, number: int) -> Tensor:
        """Return a tensor: what is kept itself, not a copy."""
        assert self._mapping is not None
        return self._view(self._mapping, number, self._kept[number])

    def take(self, number: int) -> Tensor:
        """Return a copy of a tensor, whose pages go back to the system."""
        copy = self.get(number).clone()
        self.drop(number)
        return copy

    def drop(self, number: int) -> None:
        """Return a tensor's pages to the system; what was got of it is lost."""
        with self._making:
            del self._kept[number]
            if self._mapping is not None:
                start = number * self._stride
                self._mapping.madvise(mmap.MADV_DONTNEED, start, self._stride)
            if not self._kept:
                self._mapping = None

    def clear(self) -> None:
        """Forget all; the pages go once nobody holds a tensor in them."""
        self._kept.clear()
        self._mapping = None

    def _view(self, mapping: mmap.mmap, number: int, kept: _Shape) -> Tensor:
        dtype, shape = kept
        count, start = torch.Size(shape).numel(), number * self._stride
        flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=start)
        return flat.view(shape)
