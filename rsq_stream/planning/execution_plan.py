"""What a run will need and make, before the first block: sizes, counts, refusals.

``make_plan`` turns options into the plan that decides the bytes; ``plan_execution``
fits that plan into this machine's memory without changing it.
"""

import torch

from rsq_stream.checkpoint.files import SIDE_FILES
from rsq_stream.checkpoint.hub_shards import ShardSchedule, require_hub
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.execution_plan import ExecutionPlan
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.run_options import RunOptions
from rsq_stream.model.architecture import Architecture
from rsq_stream.output.layout import bits_per_weight, plan_layouts
from rsq_stream.pipeline.preflight import worth_trying
from rsq_stream.planning.memory.fit import (
    DEVICE_OVERHEAD_BYTES,
    HOST_OVERHEAD_BYTES,
    fitted,
    keeping_weights,
    memory_limits,
    reading_ahead,
)
from rsq_stream.planning.memory.sensitivity import SensitivityMemoryModel
from rsq_stream.planning.memory.stages import StageMemoryModel
from rsq_stream.planning.validate import linear_type
from rsq_stream.storage.activation_shape import slot_shape

_JOURNAL_BYTES = 256 << 10
"""An SQLite file with its rollback journal, before it grows with the model."""


def plan_execution(
    checkpoint: Checkpoint,
    architecture: Architecture,
    plan: QuantizationPlan,
    options: RunOptions,
    *,
    measures: bool = False,
    used_bytes: int | None = None,
) -> ExecutionPlan:
    """Choose units in flight, resident units, and where a block's weights lie.

    Of a run, or of the pass before it that ``measures`` what bits cost. ``used_bytes``
    is what the process had taken when it was first planned.

    Raises
    ------
    BudgetError
        Not even one unit at a time fits; the message says what would do.
    """
    shape, room = (
        slot_shape(plan, architecture.width),
        memory_limits(options, used_bytes),
    )
    wanted = options.units_in_flight or 2 * options.workers
    kind = SensitivityMemoryModel if measures else StageMemoryModel
    memory = fitted(
        kind(
            architecture=architecture,
            plan=plan,
            source_type=linear_type(checkpoint, architecture),
            in_flight=min(wanted, plan.units) if plan.needs_calibration else 1,
            workers=options.workers,
            on_gpu=options.on_gpu,
        ),
        room,
        may_keep=not measures,
    )
    if options.on_gpu and not measures and not memory.offloads_weights:
        memory = keeping_weights(memory, room)
    if options.on_gpu and not options.evict_source:
        # Elsewhere the compute would share its cores; and evicting, shards come in the
        # order that blocks ask for them.
        memory = reading_ahead(memory, room)
    stages = memory.stages()
    working = max(made.host_bytes for made in stages) + HOST_OVERHEAD_BYTES
    device = max(made.device_bytes for made in stages)
    slots = 3 * plan.streams if plan.needs_calibration else 0
    spare = max(0, room.host_bytes - working)
    resident = min(shape.units, spare // (slots * shape.unit_bytes)) if slots else 0
    cached_mlp_units, mlp_unit_bytes = 0, _mlp_unit_bytes(architecture, plan)
    if slots and resident == shape.units and not options.on_gpu:
        spare -= resident * slots * shape.unit_bytes
        cached_mlp_units = min(shape.units, spare // mlp_unit_bytes)
    layouts = plan_layouts(checkpoint, architecture, plan)
    output_bytes = sum(layout.size_bytes for layout in layouts)
    source_bytes = sum(entry.size_bytes for entry in checkpoint.tensors.values())
    source_disk_bytes = source_bytes
    if options.evict_source:
        require_hub(checkpoint)
        source_disk_bytes = ShardSchedule(checkpoint, architecture).most_bytes()
    passes = architecture.blocks
    # Whole chunks, as in the scratch: the last unit's is as large as the others.
    whole_bytes = shape.units * shape.unit_bytes
    durable = plan.streams * whole_bytes * (2 * passes + 1) if slots else 0
    return ExecutionPlan(
        in_flight=memory.in_flight,
        resident_units=resident,
        cached_mlp_units=cached_mlp_units,
        mlp_bytes=cached_mlp_units * mlp_unit_bytes,
        slots=slots,
        slot_bytes=shape.slot_bytes,
        working_bytes=working,
        scratch_bytes=slots * whole_bytes,
        written_bytes=output_bytes + durable,
        source_bytes=source_bytes,
        source_disk_bytes=source_disk_bytes,
        output_bytes=output_bytes,
        small_bytes=_small_bytes(checkpoint, architecture),
        bits_per_weight=bits_per_weight(architecture, layouts),
        fallbacks=tuple(
            name
            for name, inputs in architecture.linear_inputs().items()
            if inputs % plan.group_size
        ),
        solves_largest_first=(options.on_gpu or options.ram_bytes is not None)
        and worth_trying(architecture, plan),
        used_bytes=room.used_bytes,
        offloads_weights=memory.offloads_weights,
        keeps_solver_weights_on_gpu=memory.keeps_solver_weights_on_gpu,
        prefetches_blocks=memory.prefetches_blocks,
        device_bytes=device + DEVICE_OVERHEAD_BYTES if options.on_gpu else 0,
        stages=stages,
    )


def _mlp_unit_bytes(architecture: Architecture, plan: QuantizationPlan) -> int:
    """Return what a unit's u takes, of all streams, in the type that is computed in."""
    compute: torch.dtype = getattr(torch, plan.compute_type)
    values = plan.unit_tokens * architecture.mlp_width
    return plan.streams * compute.itemsize * values


def _small_bytes(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """Estimate tokenizer, index, manifest and journal: some 2 kB a linear in all."""
    files = checkpoint.files
    carried = sum(
        files.path(name).stat().st_size for name in SIDE_FILES if files.exists(name)
    )
    return carried + 2_000 * len(architecture.model_linears()) + _JOURNAL_BYTES
