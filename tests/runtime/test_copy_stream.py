"""What a copy stream asks of CUDA, and in which order: without a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rsq_stream.runtime.copy_stream import SideStream

LOG: list[str] = []
COMPUTE, SIDE = "compute", "side"


class FakeEvent:
    def __init__(self, *, blocking: bool) -> None:
        assert blocking
        self.name = ""

    def record(self, stream: "FakeStream") -> None:
        self.name = f"{stream.name}@{len(LOG)}"
        LOG.append(f"record {self.name}")

    def synchronize(self) -> None:
        LOG.append(f"host waits for {self.name}")


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_event(self, event: FakeEvent) -> None:
        LOG.append(f"{self.name} waits for {event.name}")


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> SideStream:
    """Return a copy stream of a CUDA that only writes down what it is asked."""
    LOG.clear()
    current = [FakeStream(COMPUTE)]

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream(SIDE))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    known = Tensor.copy_

    def copy(self: Tensor, source: Tensor, *, non_blocking: bool) -> Tensor:
        assert non_blocking
        LOG.append(f"copy on {current[-1].name}")
        return known(self, source)

    monkeypatch.setattr(Tensor, "copy_", copy)
    return SideStream(torch.device("cpu"))


def test_a_copy_waits_for_compute_and_compute_for_it(side: SideStream) -> None:
    target, source = torch.zeros(3), torch.ones(3)
    done = side.copy(target, source, side.now())
    side.hold_compute(done)
    done.synchronize()
    assert LOG == [
        "record compute@0",
        "side waits for compute@0",
        "copy on side",
        "record side@3",
        "compute waits for side@3",
        "host waits for side@3",
    ]
    assert torch.equal(target, source)


@pytest.mark.parametrize("off", [0, 512])
def test_buffers_begin_where_a_page_does(
    side: SideStream, monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    """The driver may put small ones side by side."""
    known, asked = torch.empty, []

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        asked.append(size)
        room = known(size + 8192, dtype=dtype)
        start = -room.data_ptr() % 4096 + off
        return room[start : start + size]

    monkeypatch.setattr(torch, "empty", empty)
    made = side.pinned(5000)
    assert made.numel() == 5000
    assert made.data_ptr() % 4096 == 0
    assert asked == ([5000] if off == 0 else [5000, 9096])
