"""What goes into a run, and what comes out."""

from dataclasses import dataclass
from pathlib import Path

from rsq_stream.events import LinearRecord
from rsq_stream.pipeline.stage_profile import StageTaken


@dataclass(frozen=True)
class RunSummary:
    """What a finished run made."""

    output: Path
    seconds: float
    resumed_at: int
    """The first block that this process did; 0 for an uninterrupted run."""
    records: tuple[LinearRecord, ...]
    output_bytes: int
    stages: tuple[StageTaken, ...]
    """What each stage took: seconds over all blocks, and its highest peaks."""
