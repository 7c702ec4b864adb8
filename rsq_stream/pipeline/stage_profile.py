"""What each stage of a block took: seconds, and the peaks of host and GPU memory."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rsq_stream.runtime.device_memory import peak_bytes
from rsq_stream.runtime.host_memory import HostPeak


@dataclass(frozen=True, slots=True)
class StageUsage:
    """What one stage took; its name is that of the memory plan."""

    name: str
    seconds: float
    host_bytes: int
    """Of the whole process."""
    device_bytes: int
    """Of tensors on the GPU."""


class StageProfiler:
    """Measures stages of a run; without ``device`` it measures nothing."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._peak = HostPeak() if device is not None else None
        self._taken: list[StageUsage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside; nothing is kept of what fails."""
        if self._device is None or self._peak is None:
            yield
            return
        self._peak.take()
        peak_bytes(self._device)
        began = time.monotonic()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.monotonic() - began
        made = StageUsage(name, seconds, self._peak.take(), peak_bytes(self._device))
        self._taken.append(made)

    def unjournalled(self) -> list[StageUsage]:
        """Return what was measured since the last call."""
        taken, self._taken = self._taken, []
        return taken

    def close(self) -> None:
        """Stop measuring."""
        if self._peak is not None:
            self._peak.close()


def added_up(taken: Iterable[StageUsage]) -> tuple[StageUsage, ...]:
    """Return each stage once: its seconds over all blocks, and its highest peaks."""
    found: dict[str, StageUsage] = {}
    for made in taken:
        before = found.get(made.name, StageUsage(made.name, 0.0, 0, 0))
        found[made.name] = StageUsage(
            made.name,
            before.seconds + made.seconds,
            max(before.host_bytes, made.host_bytes),
            max(before.device_bytes, made.device_bytes),
        )
    return tuple(found.values())
