"""A device that is none: queues of compute and copies, run in any order events allow.

What waits for nothing may happen at once or much later; a schedule picked at random,
many times, finds what only luck would order.
"""

import random
import threading
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.gptq import ldl
from rsq_stream.pipeline.activations import finite_check, slots
from rsq_stream.runtime.copy_stream import StreamEvent

POISON = 171


class FakeDevice:
    """Queues of work, of which the head of any may be next."""

    def __init__(self, seed: int = 0, *, lazy: bool = True) -> None:
        """Without ``lazy``, compute is what the test itself does, at once."""
        self.lazy = lazy
        self.compute: deque[Callable[[], bool]] = deque()
        self.queues = [self.compute]
        self.log: list[str] = []
        self._random = random.Random(seed)
        self._lock = threading.RLock()

    def launch(self, work: Callable[[], object]) -> None:
        """Put compute at the end of its queue."""
        self.put(self.compute, work)

    def put(self, queue: deque[Callable[[], bool]], work: Callable[[], object]) -> None:
        def done() -> bool:
            work()
            return True

        with self._lock:
            queue.append(done)

    def run_until(self, ready: Callable[[], bool]) -> None:
        """Do one piece of work after the other, of whichever queue can go on."""
        while True:
            with self._lock:
                if ready():
                    return
                stuck = True
                for queue in self._random.sample(self.queues, len(self.queues)):
                    if queue and queue[0]():
                        queue.popleft()
                        stuck = False
                        break
                assert not stuck, "no queue can go on"

    def drain(self) -> None:
        """Finish all that was launched."""
        self.run_until(lambda: not any(self.queues))


class FakeMoment:
    """An event: reached when its queue comes to it."""

    def __init__(self, device: FakeDevice) -> None:
        self.reached = False
        self._device = device

    def reach(self) -> None:
        self.reached = True

    def synchronize(self) -> None:
        self._device.run_until(lambda: self.reached)


class FakeCopies:
    """A copy stream of such a device."""

    device = torch.device("cpu")

    def __init__(self, fake: FakeDevice) -> None:
        self.fake = fake
        self.queue: deque[Callable[[], bool]] = deque()
        self.made_bytes = 0
        fake.queues.append(self.queue)

    def pinned(self, size_bytes: int) -> Tensor:
        self.made_bytes += size_bytes
        return torch.full((size_bytes,), POISON, dtype=torch.uint8)

    def on_device(self, size_bytes: int) -> Tensor:
        return torch.full((size_bytes,), POISON, dtype=torch.uint8)

    def now(self) -> FakeMoment:
        moment = FakeMoment(self.fake)
        if self.fake.lazy:
            self.fake.launch(moment.reach)
        else:
            moment.reach()
        return moment

    def copy(self, target: Tensor, source: Tensor, after: StreamEvent) -> FakeMoment:
        assert isinstance(after, FakeMoment)
        self.queue.append(lambda: after.reached)
        self.fake.put(self.queue, lambda: target.copy_(source))
        self.fake.put(self.queue, lambda: self.fake.log.append("copied"))
        moment = FakeMoment(self.fake)
        self.fake.put(self.queue, moment.reach)
        return moment

    def hold_compute(self, until: StreamEvent) -> None:
        assert isinstance(until, FakeMoment)
        if self.fake.lazy:
            self.fake.compute.append(lambda: until.reached)
        else:
            until.synchronize()


def take_a_gpus_way(monkeypatch: pytest.MonkeyPatch, seed: int) -> FakeDevice:
    """Have runs take a GPU's way through copies, flags and events, on the CPU."""
    fake = FakeDevice(seed, lazy=False)
    monkeypatch.setattr(slots, "copies_aside", lambda _: True)
    monkeypatch.setattr(slots, "SideStream", lambda _: FakeCopies(fake))
    monkeypatch.setattr(finite_check, "_looks_at_each_unit", lambda _: False)
    monkeypatch.setattr(ldl, "_looks_at_each_block", lambda _: False)
    return fake
