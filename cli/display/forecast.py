"""What a run is expected to take, beside what it took."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .text import duration, size, table

if TYPE_CHECKING:
    from rsq_stream.config.quantization_plan import QuantizationPlan
    from rsq_stream.pipeline.job import Job
    from rsq_stream.pipeline.stage_profile import StageTaken
    from rsq_stream.planning.machine_speed import Rates
    from rsq_stream.planning.time_estimate import Prediction

_HOLDS_MLP = ("mlp out", "outputs")
"""What the stages' names begin with that keep the MLP's inner activations."""
_FILLED = (("attention out", 2), ("mlp", 2), ("outputs", 3))
"""How many of a stream's three slots hold something; elsewhere one does."""


def forecast(made: "Job") -> "Prediction | None":
    """Predict a run's seconds by what this machine does; None for a card not here."""
    import torch

    from rsq_stream.planning.time_estimate import predict
    from rsq_stream.storage.atomic import existing

    options = made.options
    if options.on_gpu and not torch.cuda.is_available():
        return None
    folder = existing(options.work_dir.absolute())
    rates = _rates(made.plan, options.device, options.workers, folder)
    return predict(
        made.architecture, made.plan, made.execution, rates, on_gpu=options.on_gpu
    )


@functools.lru_cache(maxsize=4)
def _rates(
    plan: "QuantizationPlan", device: str, workers: int, folder: Path
) -> "Rates":
    import torch

    from rsq_stream.planning.machine_speed import measure_rates

    return measure_rates(plan, torch.device(device), workers, folder)


def forecast_rows(found: "Prediction | None") -> dict[str, str]:
    """Say in one line how long a run will take."""
    if found is None:
        return {"time": "not predicted: the card is not here"}
    return {"time": f"about {duration(found.seconds)}, by what this machine does now"}


def compared(
    made: "Job", expected: "Prediction | None", taken: Sequence["StageTaken"]
) -> dict[str, dict[str, Any]]:
    """Put what each stage was expected to take beside what it took."""
    memory = {stage.name: stage for stage in made.execution.stages}
    host = _host_bytes(made)
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


def kept_bytes(made: "Job", stage: str) -> int:
    """Give what units take that stay in memory while a stage of a block is run.

    A block's input always does; after it what attention gave, in whose place h comes;
    at last its output.
    """
    execution, units = made.execution, made.plan.units
    if not execution.slots or not units:
        return 0
    filled = next((count for name, count in _FILLED if stage.startswith(name)), 1)
    slots = execution.slots // 3 * filled
    # Rounded up: the last unit may be smaller than the others.
    resident = slots * execution.slot_bytes * execution.resident_units // units
    return resident + _kept_mlp_bytes(made, stage)


def _kept_mlp_bytes(made: "Job", stage: str) -> int:
    execution, plan = made.execution, made.plan
    if not execution.mlp_units or not stage.startswith(_HOLDS_MLP):
        return 0
    kept = execution.mlp_units
    if stage == "mlp out: pass" and plan.streams == 1:
        # Tightest is when the last units are on their way, and theirs is yet to come.
        kept = min(kept, plan.units - min(made.options.workers, execution.in_flight))
    return execution.mlp_bytes * kept // execution.mlp_units


def tightest_on_host(made: "Job") -> tuple[str, int]:
    """Name the stage that takes most host memory, and give all of the process then."""
    found = _host_bytes(made)
    name = max(found, key=found.__getitem__)
    return name, found[name]


def _host_bytes(made: "Job") -> dict[str, int]:
    """Give by stage what the whole process takes of host memory."""
    from rsq_stream.planning.memory.fit import HOST_OVERHEAD_BYTES

    execution = made.execution
    always = execution.used_bytes + HOST_OVERHEAD_BYTES
    return {
        stage.name: always + stage.host_bytes + kept_bytes(made, stage.name)
        for stage in execution.stages
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
