"""Host memory of activations that stay there, and of the whole process by stage."""

from rsq_stream.model.families.base import Activation
from rsq_stream.pipeline.job import Job
from rsq_stream.planning.memory.fit import HOST_OVERHEAD_BYTES

_FILLED = {Activation.ATTENTION_INPUT: 1}
"""How many of a stream's three slots hold something while a stage runs; others hold 2,
and 3 while the outputs are written."""


def kept_bytes(job: Job, phase: str) -> int:
    """Count the units that stay in memory during a phase, such as ``mlp in: pass``.

    A block's input always does; after it what attention gave, in whose place h comes;
    at last the block's output.
    """
    execution, units = job.execution, job.plan.units
    if not execution.slots or not units:
        return 0
    slots = execution.slots // 3 * _filled_slots(job, phase)
    # Rounded up: the last unit may be smaller than the others.
    resident = slots * execution.slot_bytes * execution.resident_units // units
    return resident + _kept_mlp_bytes(job, phase)


def _input_of(job: Job, phase: str) -> Activation | None:
    """Return what the linears of a phase's stage read; None outside the stages."""
    name = phase.partition(":")[0]
    stages = (
        stage
        for block in job.architecture.kinds
        for stage in job.architecture.stages(block)
        if stage.name == name
    )
    return next((stage.input for stage in stages), None)


def _filled_slots(job: Job, phase: str) -> int:
    reads = _input_of(job, phase)
    if reads is None:
        return 3 if phase.startswith("outputs") else 1
    return _FILLED.get(reads, 2)


def _kept_mlp_bytes(job: Job, phase: str) -> int:
    execution, plan = job.execution, job.plan
    inner = _input_of(job, phase) is Activation.MLP_INNER
    if not execution.cached_mlp_units or not (inner or phase.startswith("outputs")):
        return 0
    kept = execution.cached_mlp_units
    if inner and phase.endswith(": pass") and plan.streams == 1:
        # Tightest is when the last units are on their way, and theirs is yet to come.
        kept = min(kept, plan.units - min(job.options.workers, execution.in_flight))
    return execution.mlp_bytes * kept // execution.cached_mlp_units


def tightest_on_host(job: Job) -> tuple[str, int]:
    """Return the phase that takes most host memory, and all of the process then."""
    by_phase = host_bytes(job)
    name = max(by_phase, key=by_phase.__getitem__)
    return name, by_phase[name]


def host_bytes(job: Job) -> dict[str, int]:
    """Return by phase what the whole process takes of host memory."""
    execution = job.execution
    always = execution.used_bytes + HOST_OVERHEAD_BYTES
    return {
        stage.name: always + stage.host_bytes + kept_bytes(job, stage.name)
        for stage in execution.stages
    }
