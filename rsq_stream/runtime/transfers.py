"""Activations on their way between host and GPU, through pinned buffers.

Reading and computing, and computing and writing, go on side by side: what bounds them
is the number of buffers, made once and used in turn.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

from torch import Tensor

from rsq_stream.runtime.copy_stream import CopyStream, StreamEvent, pinned_bytes

Fill = Callable[[int, Tensor], Tensor]
"""Brings a unit into a buffer of bytes; gives it as what it is, a view of that."""


@dataclass
class _Place:
    """A pinned buffer, and when the last copy out of it was done."""

    buffer: Tensor
    copied: StreamEvent | None = None


class ToDevice:
    """From files or host memory to the device, for one pass at a time."""

    def __init__(self, stream: CopyStream, unit_bytes: int, in_flight: int) -> None:
        self._stream = stream
        self._unit_bytes = unit_bytes
        self._places: list[_Place] = []
        self._count = buffers(in_flight)
        self._reader = ThreadPoolExecutor(1, "rsq-bring")
        self._passes = 0

    def arriving(
        self, units: Iterable[int], fill: Fill, in_flight: int
    ) -> Iterator[Tensor]:
        """Return units on the device, in order; compute waits for each there.

        Units are taken by runs of ``in_flight``: when one is asked for, all work on the
        runs before its own must have been launched. So a copy may begin while the run
        before its own computes, in the memory that the run before that one had.
        """
        stream = self._stream
        self._passes += 1
        mine = self._passes
        if not self._places:
            made = (stream.pinned(self._unit_bytes) for _ in range(self._count))
            self._places = [_Place(buffer) for buffer in made]
        ring = [stream.on_device(self._unit_bytes) for _ in range(2 * in_flight)]
        # When the last n units were asked for. At the first of these, that of unit
        # i - n, all work on unit i - 2 n, whose memory unit i gets, was launched.
        asked = deque([stream.now()] * in_flight)
        left, fills = iter(units), deque[tuple[_Place, Future[Tensor]]]()

        def fill_next(place: _Place) -> None:
            for unit in left:
                future = self._reader.submit(_filled, place, unit, fill)
                fills.append((place, future))
                return

        for place in self._places:
            fill_next(place)
        while fills:
            if mine != self._passes:
                raise RuntimeError("another pass reads through the same buffers")
            place, filled = fills.popleft()
            launched = asked.popleft()
            asked.append(stream.now())
            source = filled.result()
            room = ring.pop(0)
            ring.append(room)
            target = room[: source.nbytes].view(source.dtype).view(source.shape)
            place.copied = stream.copy(target, source, launched)
            stream.hold_compute(place.copied)
            fill_next(place)
            yield target

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(cancel_futures=True)


def _filled(place: _Place, unit: int, fill: Fill) -> Tensor:
    if place.copied is not None:
        place.copied.synchronize()
    return fill(unit, place.buffer)


class PendingCopy:
    """A unit on its way to a pinned buffer."""

    def __init__(
        self, x: Tensor, buffer: Tensor, copied: StreamEvent, free: SimpleQueue[Tensor]
    ) -> None:
        self._x: Tensor | None = x
        self._buffer = buffer
        self._copied = copied
        self._free = free

    @contextmanager
    def landed(self) -> Iterator[Tensor]:
        """Wait, and give the buffer; it is free for another unit afterwards."""
        try:
            self._copied.synchronize()
            self._x = None  # until now its memory was the copy's
            yield self._buffer
        finally:
            self._free.put(self._buffer)


class ToHost:
    """From the device to whoever writes: as many units at a time as it has buffers."""

    def __init__(self, stream: CopyStream, unit_bytes: int, in_flight: int) -> None:
        self._stream = stream
        self._unit_bytes = unit_bytes
        self._unmade = buffers(in_flight)
        self._making = threading.Lock()
        self._free: SimpleQueue[Tensor] = SimpleQueue()

    def carries(self, x: Tensor) -> bool:
        """Whether a tensor is on this device."""
        return x.device.type == self._stream.device.type

    def take(self, x: Tensor) -> PendingCopy:
        """Begin a unit's copy; waits for a buffer where all are on their way.

        Someone must wait for ``landed``, whatever happens, in another thread.
        """
        with self._making:
            if self._unmade:
                self._unmade -= 1
                self._free.put(self._stream.pinned(self._unit_bytes))
        buffer, x = self._free.get(), x.contiguous()
        target = buffer[: x.nbytes].view(x.dtype).view(x.shape)
        copied = self._stream.copy(target, x, self._stream.now())
        return PendingCopy(x, buffer, copied, self._free)


class Transfers(NamedTuple):
    """Both ways of one stream of activations."""

    inbound: ToDevice
    outbound: ToHost


def pinned_total(unit_bytes: int, in_flight: int, streams: int) -> int:
    """Return the host memory of both ways of all streams."""
    return 2 * streams * buffers(in_flight) * pinned_bytes(unit_bytes)


def staged_bytes(unit_bytes: int, in_flight: int, streams: int, written: int) -> int:
    """Return what a pass's units take on the device: two runs of each stream.

    Of so many streams it writes as many units as may wait for their copy.
    """
    return (2 * in_flight * streams + written * buffers(in_flight)) * unit_bytes


def buffers(in_flight: int) -> int:
    """Return the pinned buffers of one way: one for each unit, and one more."""
    return in_flight + 1
