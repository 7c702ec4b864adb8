"""What fits together, and what is refused before the first block."""

import torch

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import UNQUANTIZED
from rsq_stream.config.settings import Settings
from rsq_stream.errors import (
    CheckpointError,
    UnsupportedModelError,
    UsageError,
    one_of,
    require,
)
from rsq_stream.model.architecture import Architecture, read_architecture
from rsq_stream.model.tensor_names import LM_HEAD, block_prefix

ROTATIONS = ("portable", "full", "none")
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
        for name, shape in architecture.block_shapes(block).items():
            expected[prefix + name] = shape
    for name, shape in expected.items():
        entry = checkpoint.entry(name, shape)
        if entry.dtype not in _FLOAT_TYPES:
            raise UnsupportedModelError(
                f"{where}/{entry.shard}: {name} is {entry.dtype}; sources must be"
                " float32, bfloat16 or float16"
            )
    known = {*expected, LM_HEAD} if architecture.tied else set(expected)
    for name in checkpoint.tensors:
        if name not in known and not name.endswith(_IGNORED_ENDING):
            raise CheckpointError(
                f"{where}: {name} is not part of a"
                f" {architecture.family.model_type} model as config.json describes it"
            )
    return architecture


def require_consistent(settings: Settings) -> None:
    """Refuse settings that exclude each other, whatever the model.

    Raises
    ------
    UsageError
        With the option that does not fit, and what to do.
    """
    rotation, length = settings.rotation, settings.sequence_length
    if rotation is not None:
        require(rotation in ROTATIONS, "rotation", rotation, one_of(ROTATIONS))
    if length is not None:
        require(length >= 2, "sequence-length", length, "2 or more")
    grid = GRIDS[settings.grid]
    if settings.signed_scales and not settings.symmetric:
        raise UsageError("--signed-scales needs --symmetric: a zero point does as much")
    if settings.signed_scales and not grid.takes_signed_scales:
        raise UsageError(f"--signed-scales: --grid {settings.grid} is its own mirror")
    if settings.bpw is not None:
        _require_choosable(settings, grid)
    own_bits = settings.bits is not None or settings.overrides
    if settings.method == "rotate" and (own_bits or settings.head_bits != UNQUANTIZED):
        raise UsageError("--method rotate quantizes nothing: leave bits out")
    for option, default in (("tokens", None), ("chunks", "")):
        if getattr(settings, f"importance_{option}") == default:
            continue
        takers = [
            name
            for name, strategy in STRATEGIES.items()
            if getattr(strategy, f"takes_{option}")
        ]
        if settings.importance not in takers:
            raise UsageError(
                f"--importance-{option} needs --importance {' or '.join(takers)}"
            )


def _require_choosable(settings: Settings, grid: type[Grid]) -> None:
    """Refuse what ``bpw`` cannot choose bits for."""
    if not grid.mixed_bits:
        raise UsageError(
            f"--bpw chooses among integers: leave --grid {settings.grid} out"
        )
    if settings.bits is not None:
        raise UsageError("--bpw chooses the bits: leave --bits out")
    if settings.method in ("rtn", "rotate"):
        raise UsageError(
            f"--bpw measures on calibration text, which {settings.method} does without"
        )


def linear_type(checkpoint: Checkpoint, architecture: Architecture) -> torch.dtype:
    """Return the stored type of the first linear, which stands for all of them."""
    name = next(iter(architecture.model_linears()))
    return checkpoint.entry(f"{name}.weight").dtype


def require_valid_importance(
    plan: QuantizationPlan, architecture: Architecture
) -> None:
    """Refuse an unknown strategy, and options that it or the model cannot follow.

    Raises
    ------
    UsageError
        The first such option, by its name.
    """
    STRATEGIES[plan.importance].require_options(plan, plan.sequence_length)
    groups = {
        group: tuple(linear.projection for linear in group.linears)
        for block in architecture.kinds
        for stage in architecture.stages(block)
        for group in stage.groups
    }
    known = tuple(name for names in groups.values() for name in names)
    named = set(plan.importance_linears)
    for name in plan.importance_linears:
        require(name in known, "importance-linears", name, one_of(known))
    for names in groups.values():
        whole = not 0 < len(named.intersection(names)) < len(names)
        wanted = f"all or none of {', '.join(names)}: they share a Hessian"
        require(whole, "importance-linears", " ".join(sorted(named)), wanted)


def require_valid_grid(plan: QuantizationPlan) -> None:
    """Refuse a plan that its grid cannot follow, and one of a grid that there is not.

    Raises
    ------
    UsageError
        With the option, what it must be and what it is.
    """
    GRIDS[plan.grid].require_plan(plan)


def require_valid_format(plan: QuantizationPlan, architecture: Architecture) -> None:
    """Refuse a plan that its format cannot store, and a format that there is not.

    Raises
    ------
    UsageError
        With the option that does not fit, and what would.
    """
    FORMATS[plan.output_format].require(plan, architecture)
