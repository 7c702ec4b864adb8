"""What a run will need and make, before the first block: sizes, counts, refusals.

``make_plan`` turns options into the plan that decides the bytes; ``plan_execution``
fits that plan into this machine's memory without changing it.
"""

from math import prod

import psutil
import torch

from rsq_stream.config import QuantizationPlan
from rsq_stream.errors import (
    BudgetError,
    CheckpointError,
    UnsupportedModelError,
)
from rsq_stream.execution import ExecutionPlan, RunOptions
from rsq_stream.model.architecture import (
    HEAD,
    LINEARS,
    Architecture,
    block_prefix,
    read_architecture,
)
from rsq_stream.output_folder import bits_per_weight, plan_layouts
from rsq_stream.schemes import HEAD_LINEAR
from rsq_stream.slots import slot_shape
from rsq_stream.source import chunk_rows
from rsq_stream.storage.activations import SlotShape
from rsq_stream.storage.files import SIDE_FILES
from rsq_stream.storage.shards import Checkpoint
from rsq_stream.supply import Needs, require_hub

_JOURNAL_BYTES = 256 << 10
"""An SQLite file with its rollback journal, before it grows with the model."""
_OVERHEAD_BYTES = 208 << 20
"""Libraries loaded after planning, threads, and what the allocator keeps between
passes: 90 MiB seen with one stream, 180 MiB with two."""
_ROTATED, _ROUNDED = 7, 18
"""Chunks of the head in fp32 that turning and rounding it takes; 6.5 and 17 seen."""
_FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_IGNORED_ENDING = "rotary_emb.inv_freq"
"""Buffers that old checkpoints carry and every loader recomputes."""


def inspect_checkpoint(checkpoint: Checkpoint) -> Architecture:
    """Check config and headers against each other; gives the architecture.

    Raises
    ------
    UnsupportedModelError
        A family, type or tensor that this tool does not know.
    CheckpointError
        A tensor is missing or has another shape than the config says.
    """
    where = checkpoint.files.where
    if "quantization_config" in checkpoint.config:
        raise UnsupportedModelError(
            f"{where}: is quantized already; give the full-precision checkpoint"
        )
    architecture = read_architecture(checkpoint.config, where)
    expected = dict(architecture.outer_shapes())
    for block in range(architecture.blocks):
        prefix = block_prefix(block)
        for name, shape in architecture.block_shapes().items():
            expected[prefix + name] = shape
    for name, shape in expected.items():
        entry = checkpoint.entry(name, shape)
        if entry.dtype not in _FLOAT_TYPES:
            raise UnsupportedModelError(
                f"{where}/{entry.shard}: {name} is {entry.dtype}; sources must be"
                " float32, bfloat16 or float16"
            )
    known = {*expected, HEAD} if architecture.tied else set(expected)
    for name in checkpoint.tensors:
        if name not in known and not name.endswith(_IGNORED_ENDING):
            raise CheckpointError(
                f"{where}: {name} is not part of a"
                f" {architecture.family.model_type} model as config.json describes it"
            )
    return architecture


def plan_execution(
    checkpoint: Checkpoint,
    architecture: Architecture,
    plan: QuantizationPlan,
    options: RunOptions,
) -> ExecutionPlan:
    """Choose units in flight and resident units within ``options.ram_bytes``.

    Raises
    ------
    BudgetError
        Not even one unit at a time fits; the message says what would do.
    """
    shape = slot_shape(plan, architecture.width)
    used = psutil.Process().memory_info().rss
    budget = options.ram_bytes or used + int(psutil.virtual_memory().available * 0.8)
    in_flight = options.units_in_flight or 2 * options.workers
    fixed = _block_bytes(architecture, plan)
    per_unit = _unit_working_bytes(architecture, plan, shape)
    if not plan.needs_calibration:
        in_flight, per_unit = 1, 0
    fixed += _OVERHEAD_BYTES
    while in_flight > 1 and used + fixed + in_flight * per_unit > budget:
        in_flight -= 1
    working = fixed + in_flight * per_unit
    if used + working > budget and options.ram_bytes is not None:
        raise BudgetError(
            f"--ram {budget / 2**30:.2f}GiB is too little: this model needs"
            f" {(used + working) / 2**30:.2f}GiB for one block, its Hessian and one"
            " unit of activations"
        )
    slots = 3 * plan.streams if plan.needs_calibration else 0
    spare = max(0, budget - used - working)
    resident = min(shape.units, spare // (slots * shape.unit_bytes)) if slots else 0
    layouts = plan_layouts(checkpoint, architecture, plan)
    output_bytes = sum(layout.size_bytes for layout in layouts)
    source_bytes = sum(entry.size_bytes for entry in checkpoint.tensors.values())
    source_disk_bytes = source_bytes
    if options.evict_source:
        require_hub(checkpoint)
        source_disk_bytes = Needs(checkpoint, architecture).most_bytes()
    passes = architecture.blocks
    durable = plan.streams * shape.slot_bytes * (2 * passes + 1) if slots else 0
    return ExecutionPlan(
        in_flight=in_flight,
        resident_units=resident,
        slots=slots,
        slot_bytes=shape.slot_bytes,
        working_bytes=working,
        # Whole chunks: the last unit's is as large as the others.
        scratch_bytes=slots * shape.units * shape.unit_bytes,
        written_bytes=output_bytes + durable,
        source_bytes=source_bytes,
        source_disk_bytes=source_disk_bytes,
        output_bytes=output_bytes,
        small_bytes=_small_bytes(checkpoint, architecture),
        bits_per_weight=bits_per_weight(architecture, layouts),
        fallbacks=tuple(
            name
            for name in LINEARS
            if architecture.linear_shape(name)[1] % plan.group_size
        ),
    )


def _small_bytes(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """Estimate tokenizer, index, manifest and journal: some 2 kB a linear in all."""
    files = checkpoint.files
    carried = sum(
        files.path(name).stat().st_size for name in SIDE_FILES if files.exists(name)
    )
    return carried + 2_000 * architecture.blocks * len(LINEARS) + _JOURNAL_BYTES


def _block_bytes(architecture: Architecture, plan: QuantizationPlan) -> int:
    """Host bytes of one block in fp32, twice (rotation and solve), and a Hessian.

    A chunk of the embedding and head, before the first block, sets a floor.
    """
    block = 4 * sum(prod(shape) for shape in architecture.block_shapes().values())
    inputs = max(architecture.linear_shape(name)[1] for name in LINEARS)
    hessian = 4 * inputs * inputs if plan.needs_calibration else 0
    if plan.act_order:
        hessian *= 3  # the whole of it, and its columns in another order
    if plan.streams > 1:
        width = architecture.width
        hessian += 4 * width * max(inputs, width)  # the drift of down, or of q, k, v
    return max(2 * block + hessian, _outer_bytes(architecture, plan))


def _outer_bytes(architecture: Architecture, plan: QuantizationPlan) -> int:
    """Host bytes of a chunk of the embedding or head on its way to the output."""
    width = architecture.width
    rows = min(architecture.vocabulary, chunk_rows(width))
    kept = plan.scheme(HEAD_LINEAR, width) is None
    return 4 * rows * width * (_ROTATED if kept else _ROUNDED)


def _unit_working_bytes(
    architecture: Architecture, plan: QuantizationPlan, shape: SlotShape
) -> int:
    """Host bytes that one unit takes on its way through a stage, at the widest."""
    tokens = plan.unit_sequences * plan.sequence_length
    widths = 4 * architecture.width + 3 * architecture.mlp_width
    if plan.mlp_rotation != "none":
        widths += 2 * architecture.mlp_width  # two factors of a Hadamard product
    # Beside the pass itself: one unit read ahead, one waiting to be written.
    # With two streams, also the drift's errors beside their inputs.
    widths *= plan.streams
    return 4 * tokens * widths + 2 * plan.streams * shape.unit_bytes
