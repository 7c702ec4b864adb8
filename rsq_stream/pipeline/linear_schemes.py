"""Scheme and grid of each linear of a plan, and what writes its solution."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.solver import Solution
from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.source import Source
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import Scheme
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.pipeline.block_solver import Keep


def make_grid(plan: QuantizationPlan, bits: int, storage_type: torch.dtype) -> Grid:
    """Return the plan's grid of so many bits, for weights of that stored type."""
    return GRIDS[plan.grid](
        bits=bits,
        symmetric=plan.symmetric,
        signed_scales=plan.signed_scales,
        clip_exponent=plan.clip_exponent,
        clip_steps=plan.clip_steps,
        storage_type=storage_type,
    )


def keeper(
    index: int,
    plan: QuantizationPlan,
    source: Source,
    write: Callable[[dict[str, Tensor]], None],
) -> Keep:
    """Return what writes a block's solutions to the output, packed."""
    types = source.linear_types(index)
    stored = FORMATS[plan.output_format]

    def keep(linear: str, solution: Solution) -> None:
        name = block_prefix(index) + linear
        scheme = plan.scheme(name, solution.code_OI.shape[1])
        assert scheme is not None
        write(stored.encode(name, solution, scheme, types[linear]))

    return keep


def schemes_and_grids(
    index: int, plan: QuantizationPlan, source: Source, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Scheme], dict[str, Grid]]:
    """Return scheme and grid of each linear of a block that is quantized, in order."""
    schemes, grids = {}, {}
    for linear, dtype in source.linear_types(index).items():
        inputs = tensors[f"{linear}.weight"].shape[1]
        scheme = plan.scheme(block_prefix(index) + linear, inputs)
        if scheme is not None:
            schemes[linear] = scheme
            grids[linear] = make_grid(plan, scheme.bits, dtype)
    return schemes, grids
