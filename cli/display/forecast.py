"""What a run is expected to take, beside what it took."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .text import duration, size, table

if TYPE_CHECKING:
    from rsq_stream.pipeline.job import Job
    from rsq_stream.pipeline.stage_profile import StageUsage
    from rsq_stream.planning.time_estimate import Prediction


def forecast_rows(found: "Prediction | None") -> dict[str, str]:
    """Describe in one line how long a run will take."""
    if found is None:
        return {"time": "not predicted: the card is not here"}
    return {"time": f"about {duration(found.seconds)}, by what this machine does now"}


def compared(
    made: "Job", expected: "Prediction | None", taken: Sequence["StageUsage"]
) -> dict[str, dict[str, Any]]:
    """Put what each stage was expected to take beside what it took."""
    memory = {stage.name: stage for stage in made.execution.stages}
    from rsq_stream.planning.memory.resident_units import host_bytes

    host = host_bytes(made)
    seconds = expected.stages if expected else {}
    return {
        stage.name: {
            "predicted_s": seconds.get(stage.name),
            "measured_s": stage.seconds,
            "predicted_host_bytes": host[stage.name],
            "measured_host_bytes": stage.host_bytes,
            "predicted_device_bytes": memory[stage.name].device_bytes,
            "measured_device_bytes": stage.device_bytes,
        }
        for stage in taken
        if stage.name in memory
    }


def stage_table(made: "Job", found: dict[str, dict[str, Any]]) -> str:
    """Write it as a table; memory is that of the GPU, where one computes."""
    kind = "device" if made.options.on_gpu else "host"
    rows = [
        (
            name,
            "-" if row["predicted_s"] is None else f"{row['predicted_s']:.1f} s",
            f"{row['measured_s']:.1f} s",
            size(row[f"predicted_{kind}_bytes"]),
            size(row[f"measured_{kind}_bytes"]),
        )
        for name, row in found.items()
    ]
    memory = "GPU memory" if made.options.on_gpu else "memory"
    head = ("stage", "predicted", "took", f"{memory} predicted", "peak")
    return table(head, rows)
