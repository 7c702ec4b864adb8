"""Scheme and grid of each linear of a plan, and what writes its solution."""

from collections.abc import Callable, Mapping

from torch import Tensor

from rsq_stream.algorithm.gptq.solver import Solution
from rsq_stream.algorithm.grids._planned import make_grid
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.config.schemes import Scheme
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.pipeline.run import QuantizationRun, Run

WriteSolution = Callable[[str, Solution], None]
"""Writes the codes of a block's linear, by its name in the block."""


def solution_writer(
    run: QuantizationRun, index: int, write: Callable[[dict[str, Tensor]], None]
) -> WriteSolution:
    """Return a function that packs a solution of a block's linear, and writes it."""
    types = run.source.linear_types(index)
    stored = FORMATS[run.job.plan.output_format]

    def write_solution(linear: str, solution: Solution) -> None:
        name = block_prefix(index) + linear
        scheme = run.job.plan.scheme(name, solution.code_OI.shape[1])
        assert scheme is not None
        write(stored.encode(name, solution, scheme, types[linear]))

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
