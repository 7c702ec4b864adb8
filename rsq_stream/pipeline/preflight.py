"""Solve the largest linear once with random data: what memory cannot hold fails now.

Not hours later, when the first block comes to it. Nothing is kept.
"""

import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.error_propagation import CrossTerm
from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import factorise
from rsq_stream.algorithm.gptq.solver import solve
from rsq_stream.algorithm.grids._planned import make_grid
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import BudgetError
from rsq_stream.events import Notice
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.families.base import Group, Linear
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.pipeline.activations.calibration_pass import CalibrationPasses
from rsq_stream.pipeline.job import Job

LEAST_INPUTS = 2048
"""Smaller linears are not worth it: their memory is not what a run fails for."""
_TOKENS = 64
"""Enough for a Hessian; damping makes it positive definite."""


def largest_linear(
    architecture: Architecture, plan: QuantizationPlan
) -> tuple[Group, Linear, Scheme] | None:
    """Return the solved linear that has the most inputs, if any, and its group."""
    if not plan.needs_calibration:
        return None
    solved = [
        (group, linear, scheme)
        for block in architecture.kinds
        for stage in architecture.stages(block)
        for group in stage.groups
        for linear in group.linears
        if (
            scheme := plan.scheme(
                block_prefix(block) + linear.name, architecture.size(linear.inputs)
            )
        )
    ]

    def inputs(entry: tuple[Group, Linear, Scheme]) -> int:
        return architecture.size(entry[1].inputs)

    return max(solved, key=inputs, default=None)


def worth_trying(architecture: Architecture, plan: QuantizationPlan) -> bool:
    """Return whether the largest linear is large enough to fail for memory."""
    largest = largest_linear(architecture, plan)
    return largest is not None and (
        architecture.size(largest[1].inputs) >= LEAST_INPUTS
    )


def solve_largest_once(job: Job, passes: CalibrationPasses) -> None:
    """Accumulate, factorise and solve as a run will, but a tile of rows a worker.

    Raises
    ------
    BudgetError
        Memory ran out.
    """
    architecture = job.architecture
    largest = largest_linear(architecture, job.plan)
    if largest is None:
        return
    group, linear, scheme = largest
    shape = architecture.shape(linear)
    what = f"{linear.role}, {shape[1]} inputs"
    passes.listener(Notice(text=f"trying the largest linear first: {what}"))
    try:
        _solve_once(job, passes, shape, scheme, alone=group.alone is not None)
    except (MemoryError, RuntimeError) as error:
        if not _ran_out(error):
            raise
        raise BudgetError(
            f"memory ran out while the largest linear ({what}) was solved with random"
            " data; free some of it, or give a larger --vram or --ram"
        ) from error


def _solve_once(
    job: Job,
    passes: CalibrationPasses,
    shape: tuple[int, int],
    scheme: Scheme,
    *,
    alone: bool,
) -> None:
    plan, pool, (outputs, inputs) = job.plan, passes.pool, shape
    device = torch.device(job.options.device)
    random = torch.Generator().manual_seed(0)
    compute = getattr(torch, plan.compute_type)
    x_TI = torch.randn(_TOKENS, inputs, generator=random).to(device, compute)
    weight_T = torch.ones(_TOKENS, device=device)
    hessian = Hessian(inputs, plan.hessian_panel, device)
    hessian.add([(x_TI, weight_T)], pool)
    cross_term = None
    if plan.streams > 1:
        # Linears that share an input share C - H, others have a G of their own.
        rows = outputs if alone else None
        cross_term = CrossTerm(rows, inputs, plan.hessian_panel, device)
        error_TR = torch.randn(_TOKENS, rows or inputs, generator=random).to(device)
        cross_term.add([(error_TR, x_TI)], pool)
    factor = factorise(
        hessian, max(plan.damping, plan.damping_for(inputs)), plan.tile_columns, pool
    )
    tile_rows = plan.tile_rows_of(inputs)
    taken = min(outputs, tile_rows * pool.workers)
    weight_OI = torch.randn(taken, inputs, generator=random)

    def target(weight_RI: Tensor, rows: slice) -> Tensor:
        if cross_term is None:
            return weight_RI
        share = plan.propagate or 1.0
        return cross_term.correction(weight_RI, rows, factor, share).add_(weight_RI)

    solve(
        weight_OI,
        factor,
        make_grid(plan, scheme.bits, torch.bfloat16),
        scheme.group_size,
        dynamic_scales=plan.group_scales == "dynamic",
        tile_rows=tile_rows,
        pool=pool,
        sweeps=plan.sweeps,
        refit=plan.refit,
        target=target,
    )


def _ran_out(error: BaseException) -> bool:
    """Tell lack of memory from other errors: on a host torch has no type for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)
