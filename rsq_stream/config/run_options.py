"""What may change between a kill and the resume: place and speed, never a byte."""

import re
from dataclasses import dataclass
from pathlib import Path

from rsq_stream.errors import UsageError, require

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What may change on resume: place and speed."""

    output: Path
    work_dir: Path
    device: str = "cpu"
    ram_bytes: int | None = None
    """Host memory the whole process may use; None is what the machine has free."""
    vram_bytes: int | None = None
    """GPU memory the whole process may use; None is what the card has free."""
    workers: int = 1
    """Threads that compute units, panels and tiles side by side (CPU only)."""
    units_in_flight: int = 0
    """Units between two barriers of a pass; 0 lets the planner choose."""
    allow_device_change: bool = False
    """Go on although another kind of device gives other bits; the output says so."""
    evict_source: bool = False
    """Remove a hub model's shards from the cache after use, those the run fetched."""
    restart: bool = False
    keep_work: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.device.startswith("cuda")

    def __post_init__(self) -> None:
        require(1 <= self.workers <= 1024, "threads", self.workers, "1 to 1024")
        require(
            0 <= self.units_in_flight <= 4096,
            "batch",
            self.units_in_flight,
            "0 (automatic) to 4096",
        )


def parse_size(option: str, text: str) -> int:
    """Read a size in bytes: ``8GiB`` and ``2g`` count in 1024s, ``500MB`` in 1000s.

    Raises
    ------
    UsageError
        The text is no size, or less than one byte.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is not None:
        number, unit, ending = found.groups()
        base = 1000 if (ending or "").lower() == "b" else 1024
        size = int(float(number) * base ** _UNITS[unit.lower()])
        if size >= 1:
            return size
    raise UsageError(f"{option} must be a size such as 8GiB, 500MB or 2g, not {text!r}")
