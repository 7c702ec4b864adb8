"""What fits together, and what is refused before the first block."""

import torch

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import CheckpointError, UnsupportedModelError
from rsq_stream.model.architecture import Architecture, read_architecture
from rsq_stream.model.tensor_names import HEAD, block_prefix

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
