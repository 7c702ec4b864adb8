"""Copies between host and GPU on a stream of their own, beside the compute.

Whoever computes launches on the current stream and waits for nothing. A copy begins
after a moment of that stream, and compute is held until a copy is done: both by events
on the device. Only threads that read and write files wait for an event themselves.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_PAGE = 4096
"""What O_DIRECT asks of a buffer's address."""


@runtime_checkable
class StreamEvent(Protocol):
    """A point in a stream's work; torch's event is one."""

    def synchronize(self) -> None:
        """Wait, on the host, until the stream has come so far."""


@runtime_checkable
class CopyStream(Protocol):
    """What copies need of a device; tests have one that is no device."""

    device: torch.device

    def pinned(self, size_bytes: int) -> Tensor:
        """Return page-locked host memory, as bytes, that O_DIRECT takes."""
        ...

    def on_device(self, size_bytes: int) -> Tensor:
        """Return device memory, as bytes, that compute launched from now on may use."""
        ...

    def now(self) -> StreamEvent:
        """Return the moment when all compute that was launched so far is done."""
        ...

    def copy(self, target: Tensor, source: Tensor, after: StreamEvent) -> StreamEvent:
        """Copy once ``after`` is reached; gives the moment when that is done.

        Until then the caller keeps both tensors: the allocator hands memory on by
        the order of one stream, and knows nothing of the other.
        """
        ...

    def hold_compute(self, until: StreamEvent) -> None:
        """Make compute that is launched from now on wait, on the device."""
        ...


class SideStream:
    """A copy stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def pinned(self, size_bytes: int) -> Tensor:
        """Return page-locked host memory; torch rounds it up to a power of two."""
        made = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        if made.data_ptr() % _PAGE:  # the driver puts small ones side by side
            room = torch.empty(size_bytes + _PAGE, dtype=torch.uint8, pin_memory=True)
            start = -room.data_ptr() % _PAGE
            made = room[start : start + size_bytes]
        return made

    def on_device(self, size_bytes: int) -> Tensor:
        """Return memory of the current stream."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def now(self) -> StreamEvent:
        """Record an event on the current stream."""
        event = torch.cuda.Event(blocking=True)  # who waits for it sleeps
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: StreamEvent) -> StreamEvent:
        """Put the copy on the side stream."""
        assert isinstance(after, torch.cuda.Event)
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def hold_compute(self, until: StreamEvent) -> None:
        """Make the current stream wait for the event."""
        assert isinstance(until, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(until)


def pinned_bytes(size_bytes: int) -> int:
    """Return what torch's allocator takes for a pinned buffer: a power of two."""
    return 1 << max(0, size_bytes - 1).bit_length()
