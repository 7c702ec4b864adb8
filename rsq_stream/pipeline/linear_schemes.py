"""The grid of a plan: integers, NormalFloat, or the E8P lattice."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.solver import Solution
from rsq_stream.algorithm.grids.e8p import LatticeGrid
from rsq_stream.algorithm.grids.integer import Grid
from rsq_stream.algorithm.grids.nf import NormalFloat
from rsq_stream.checkpoint.formats.compressed_tensors import encode_linear
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import INTEGER, LATTICE, NORMAL_FLOAT, Scheme
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.pipeline.run import QuantizationRun, Run

_GRIDS = {INTEGER: Grid, NORMAL_FLOAT: NormalFloat, LATTICE: LatticeGrid}


WriteSolution = Callable[[str, Solution], None]
"""Writes the codes of a block's linear, by its name in the block."""


def make_grid(plan: QuantizationPlan, bits: int, storage_type: torch.dtype) -> Grid:
    """Give the grid of a plan and a scheme's bits, for weights of that stored type."""
    return _GRIDS[plan.grid](
        bits=bits,
        symmetric=plan.symmetric,
        signed_scales=plan.signed_scales,
        clip_exponent=plan.clip_exponent,
        clip_steps=plan.clip_steps,
        storage_type=storage_type,
    )


def solution_writer(
    run: QuantizationRun, index: int, write: Callable[[dict[str, Tensor]], None]
) -> WriteSolution:
    """Return a function that packs a solution of a block's linear, and writes it."""
    types = run.source.linear_types(index)

    def write_solution(linear: str, solution: Solution) -> None:
        name = block_prefix(index) + linear
        scheme = run.job.plan.scheme(name, solution.code_OI.shape[1])
        assert scheme is not None
        write(encode_linear(name, solution, scheme, types[linear]))

    return write_solution


def schemes_and_grids(
    run: Run, index: int, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Scheme, Grid]]:
    """Return scheme and grid of each linear of a block that is quantized, in order."""
    quantized = {}
    for linear, dtype in run.source.linear_types(index).items():
        inputs = tensors[f"{linear}.weight"].shape[1]
        scheme = run.job.plan.scheme(block_prefix(index) + linear, inputs)
        if scheme is not None:
            quantized[linear] = scheme, make_grid(run.job.plan, scheme.bits, dtype)
    return quantized
