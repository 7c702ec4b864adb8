"""What a run will need and make, before the first block: sizes, counts, refusals.

``make_plan`` turns options into the plan that decides the bytes; ``plan_execution``
fits that plan into this machine's memory without changing it.
"""

import importlib.metadata
import platform
from dataclasses import dataclass
from math import prod

import psutil
import torch

from rsq_stream.algorithm.rotation import rotation_name
from rsq_stream.calibration import DATA_SETS, Windows
from rsq_stream.config import (
    ExecutionPlan,
    QuantizationPlan,
    RunOptions,
)
from rsq_stream.errors import (
    BudgetError,
    CheckpointError,
    UnsupportedModelError,
    UsageError,
)
from rsq_stream.model.architecture import (
    HEAD,
    LINEARS,
    Architecture,
    block_prefix,
    read_architecture,
)
from rsq_stream.ops.walsh import package_version
from rsq_stream.output_folder import bits_per_weight, plan_layouts
from rsq_stream.slots import slot_shape
from rsq_stream.storage.activations import SlotShape
from rsq_stream.storage.shards import Checkpoint

UNIT_TOKENS = 2048
"""A unit holds as many whole sequences as fit into this many tokens, at least one."""
SHARD_BYTES = 4_000_000_000
DEFAULT_LONGEST = 4096
"""Default sequence length, where the model was made for as much."""
PROPAGATE = 0.0
"""Default of ``--propagate`` for rsq."""
_OVERHEAD_BYTES = 160 << 20
"""Libraries loaded after planning, threads and the allocator: 90 to 100 MiB seen."""
_FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_IGNORED_ENDING = "rotary_emb.inv_freq"
"""Buffers that old checkpoints carry and every loader recomputes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of ``quantize`` and ``plan`` that decide bytes; None is a default."""

    method: str = "rsq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    signed_scales: bool = True
    group_scales: str = "dynamic"
    clip_exponent: float = 2.0
    clip_steps: int = 80
    damping: float = 0.01
    rotation: str | None = None
    """``portable`` or ``none``; by default what the method does."""
    importance: str | None = None
    importance_min: float | None = None
    importance_max: float = 1.0
    importance_tokens: int | None = None
    calibration: str = "wikitext2"
    samples: int = 256
    sequence_length: int | None = None
    expand: int = 1
    propagate: float | None = None
    sweeps: int = 0
    refit: bool = False
    seed: int = 0
    cache_type: str | None = None


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


def sequence_length_for(architecture: Architecture, wanted: int | None) -> int:
    """Give the sequence length: as asked, else 4096 or the model's limit."""
    if wanted is None:
        return min(DEFAULT_LONGEST, architecture.longest)
    if wanted > architecture.longest:
        raise UsageError(
            f"--sequence-length must be at most {architecture.longest}, the positions"
            f" this model was made for, not {wanted}"
        )
    return wanted


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    settings: Settings,
    windows: Windows | None,
    device: torch.device,
) -> QuantizationPlan:
    """Fill in every default and give the plan that decides the output's bytes.

    Raises
    ------
    UsageError
        A setting is out of bounds.
    """
    rotated = settings.method in ("rsq", "quarot")
    if settings.rotation not in (None, "portable", "none"):
        raise UsageError(
            f"--rotation must be portable or none, not {settings.rotation}"
        )
    if settings.rotation is not None:
        rotated = settings.rotation == "portable"
    length = sequence_length_for(architecture, settings.sequence_length)
    importance = settings.importance or (
        "attncon" if settings.method == "rsq" else "uniform"
    )
    tokens = 0
    if importance == "first-n":
        tokens = settings.importance_tokens or max(1, length // 4)
    minimum = settings.importance_min
    if minimum is None:
        # RSQ's best r_min times the sequence length is about 20 wherever the
        # authors' job files show it (0.02 at 1024, 0.01 at 2048, 0.005 at 4096).
        minimum = min(1.0, 20 / length) * settings.importance_max
    linear_type = checkpoint.entry(f"{block_prefix(0)}{LINEARS[0]}.weight").dtype
    source_type = str(linear_type).removeprefix("torch.")
    calibrated = settings.method != "rtn"
    propagate = settings.propagate
    if propagate is None:
        propagate = PROPAGATE if settings.method == "rsq" else 0.0
    # Of a file the tokens are hashed; its path decides nothing.
    calibration = settings.calibration if settings.calibration in DATA_SETS else "file"
    cuda = device.type == "cuda"
    return QuantizationPlan(
        source_sha256=checkpoint.headers_sha256,
        method=settings.method,
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        signed_scales=settings.signed_scales and settings.symmetric,
        group_scales=settings.group_scales,
        clip_exponent=settings.clip_exponent,
        clip_steps=settings.clip_steps,
        sweeps=settings.sweeps,
        refit=settings.refit,
        damping=settings.damping,
        residual_rotation=rotation_name(architecture.width) if rotated else "none",
        value_rotation=rotation_name(architecture.head_width) if rotated else "none",
        importance=importance,
        importance_min=minimum,
        importance_max=settings.importance_max,
        importance_tokens=tokens,
        calibration=calibration if calibrated else "none",
        windows_sha256=windows.sha256 if windows and calibrated else "",
        samples=settings.samples,
        sequence_length=length,
        expand=settings.expand,
        seed=settings.seed,
        propagate=propagate,
        cache_type=settings.cache_type or source_type,
        compute_type=source_type if cuda else "float32",
        unit_sequences=max(1, UNIT_TOKENS // length),
        hessian_panel=2048 if cuda else 128,
        tile_columns=128,
        tile_rows=1 << 20 if cuda else 128,
        shard_bytes=SHARD_BYTES,
        device_kind=device_kind(device),
    )


def device_kind(device: torch.device) -> str:
    """Name the processor and the library versions that the bits depend on."""
    torch_version = importlib.metadata.version("torch")
    if device.type == "cuda":
        made = torch.cuda.get_device_properties(device)
        return (
            f"cuda {made.major}.{made.minor}, {made.multi_processor_count}"
            f" multiprocessors, torch {torch_version}, {package_version()}"
        )
    blas = "mkl" if torch.backends.mkl.is_available() else "openblas"
    numba_version = importlib.metadata.version("numba")
    level = torch.backends.cpu.get_cpu_capability()
    return (
        f"cpu {platform.machine()} {level}, torch {torch_version} {blas},"
        f" numba {numba_version}"
    )


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
    passes = architecture.blocks
    durable = plan.streams * shape.slot_bytes * (2 * passes + 1) if slots else 0
    return ExecutionPlan(
        in_flight=in_flight,
        resident_units=resident,
        slots=slots,
        slot_bytes=shape.slot_bytes,
        working_bytes=working,
        scratch_bytes=slots * shape.slot_bytes,
        written_bytes=output_bytes + durable,
        source_bytes=sum(entry.size_bytes for entry in checkpoint.tensors.values()),
        output_bytes=output_bytes,
        bits_per_weight=bits_per_weight(architecture, layouts),
        fallbacks=tuple(
            name
            for name in LINEARS
            if plan.group_size_for(architecture.linear_shape(name)[1])
            != plan.group_size
        ),
    )


def _block_bytes(architecture: Architecture, plan: QuantizationPlan) -> int:
    """Host bytes of one block in fp32, twice (rotation and solve), and a Hessian.

    The embedding and head, read whole before the first block, set a floor.
    """
    block = 4 * sum(prod(shape) for shape in architecture.block_shapes().values())
    inputs = max(architecture.linear_shape(name)[1] for name in LINEARS)
    hessian = 4 * inputs * inputs if plan.needs_calibration else 0
    if plan.propagate > 0:
        width = architecture.width
        hessian += 4 * width * max(inputs, width)  # the drift of down, or of q, k, v
    outer = 2 * 4 * architecture.vocabulary * architecture.width
    return max(2 * block + hessian, outer)


def _unit_working_bytes(
    architecture: Architecture, plan: QuantizationPlan, shape: SlotShape
) -> int:
    """Host bytes that one unit takes on its way through a stage, at the widest."""
    tokens = plan.unit_sequences * plan.sequence_length
    widths = 4 * architecture.width + 3 * architecture.mlp_width
    # Beside the pass itself: one unit read ahead, one waiting to be written.
    # With two streams, also the drift's errors beside their inputs.
    widths *= plan.streams
    return 4 * tokens * widths + 2 * plan.streams * shape.unit_bytes
