"""Where the runs of a sweep go: one process a GPU, or so many on the CPU."""

import os
from dataclasses import dataclass, field

from rsq_stream.errors import require

_MOST_ON_CPU = 256


@dataclass(frozen=True, kw_only=True)
class Place:
    """Room for one run at a time."""

    name: str
    """How lines name it: ``cpu``, ``cuda:1``."""
    device: str
    """As the run's own process sees it."""
    threads: int | None = None
    """Of a run that asks for none; None is what ``quantize`` takes."""
    ram: str | None = None
    """The same of host memory: its share of what is free, beside other runs."""
    environment: dict[str, str] = field(default_factory=dict)
    """What the process is given beside this one's."""


def places_for(
    device: str | None, processes: int | None
) -> tuple[tuple[Place, ...], tuple[str, ...]]:
    """Return the places, and the names of GPUs that are left out.

    By default all GPUs of the first one's kind: others would give other bits, which no
    table should mix. On the CPU one place, or as many as asked, sharing the cores.

    Raises
    ------
    UsageError
        No such device is here, or there are not so many GPUs.
    """
    from rsq_stream.planning.devices import cores, pick_device

    chosen = pick_device(device)
    if chosen == "cpu":
        count = 1 if processes is None else processes
        wanted = f"1 to {_MOST_ON_CPU}"
        require(1 <= count <= _MOST_ON_CPU, "processes", count, wanted)
        threads = max(1, cores() // count)
        place = Place(name="cpu", device="cpu", threads=threads, ram=_share(count))
        return (place,) * count, ()
    kinds = cuda_kinds()
    if chosen != "cuda":
        numbers, left_out = [int(chosen.rpartition(":")[2])], []
    else:
        numbers = [n for n, kind in enumerate(kinds) if kind == kinds[0]]
        left_out = [n for n, kind in enumerate(kinds) if kind != kinds[0]]
    count = len(numbers) if processes is None else processes
    wanted = f"1 to {len(numbers)}, one a GPU"
    require(1 <= count <= len(numbers), "processes", count, wanted)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if visible != [""] else [str(n) for n in range(len(kinds))]
    places = tuple(
        Place(
            name=f"cuda:{number}",
            device="cuda",
            ram=_share(count),
            environment={"CUDA_VISIBLE_DEVICES": names[number].strip()},
        )
        for number in numbers[:count]
    )
    return places, tuple(f"cuda:{number}" for number in left_out)


def _share(count: int) -> str | None:
    """Return what one of so many runs may take; by itself a run asks the machine."""
    if count == 1:
        return None
    from rsq_stream.planning.memory.fit import FREE_SHARE
    from rsq_stream.runtime.host_memory import available_bytes

    return str(int(available_bytes() * FREE_SHARE) // count)


def cuda_kinds() -> list[str]:
    """Return what decides the bits of each GPU that this process sees."""
    import torch

    from rsq_stream.planning.devices import device_kind

    return [
        device_kind(torch.device("cuda", number))
        for number in range(torch.cuda.device_count())
    ]
