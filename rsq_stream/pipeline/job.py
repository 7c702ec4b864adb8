"""What goes into a run, and what comes out."""

from dataclasses import dataclass
from pathlib import Path

from rsq_stream.calibration.windows import Windows
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.execution_plan import ExecutionPlan
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.run_options import RunOptions
from rsq_stream.events import LinearRecord
from rsq_stream.model.architecture import Architecture
from rsq_stream.pipeline.stage_profile import StageUsage


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a run is made of: checked, planned, nothing begun."""

    checkpoint: Checkpoint
    architecture: Architecture
    plan: QuantizationPlan
    """What decides the bytes."""
    execution: ExecutionPlan
    """How the plan runs on this machine."""
    options: RunOptions
    """What may change when the run is resumed: place and speed."""
    windows: Windows | None
    """Calibration tokens; None where none are needed, or none were read yet."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a finished run made."""

    output: Path
    seconds: float
    resumed_at: int
    """The first block that this process did; 0 for an uninterrupted run."""
    records: tuple[LinearRecord, ...]
    output_bytes: int
    stages: tuple[StageUsage, ...]
    """What each stage took: seconds over all blocks, and its highest peaks."""
