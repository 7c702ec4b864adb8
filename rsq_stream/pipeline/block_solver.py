"""Solve one block: per stage importance -> Hessian -> solve, then its outputs.

A group is the linears that share one input. Each pass sees the weights that the
stages before it left behind, so o is solved on what quantized q, k, v give, and
down on what quantized gate and up give: true-sequential, with partial forwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.act_order import group_aware_order, put_back, reorder
from rsq_stream.algorithm.gptq.error_propagation import CrossTerm
from rsq_stream.algorithm.gptq.ldl import Factor, factorise
from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.gptq.solver import Solution, decoded, solve
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import BudgetError, NumericalError
from rsq_stream.events import LinearRecord
from rsq_stream.model.families.base import Group, Linear, Stage
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.pipeline.linear_schemes import schemes_and_grids, solution_writer
from rsq_stream.pipeline.run import QuantizationRun
from rsq_stream.pipeline.stage_statistics import StageStatistics, Statistics
from rsq_stream.runtime.host_memory import trim_heap


@dataclass(kw_only=True)
class BlockSolver:
    """One block on its way from full precision to codes."""

    run: QuantizationRun
    index: int
    streams: list[Stream]
    """The quantized stream; with error propagation the full-precision one too."""
    weights: dict[str, Tensor]
    """fp32 weights by linear, mostly in host memory; each is dropped when solved."""
    quantized: dict[str, tuple[Scheme, Grid]]
    """How each linear is quantized; those that are not are absent."""
    statistics: StageStatistics
    done: int
    """The number of stages that are done; their linears hold quantized weights."""

    @property
    def remaining_stages(self) -> list[tuple[int, Stage]]:
        """The stages that are not done, with their numbers."""
        stages = self.run.job.architecture.stages(self.index)
        return list(enumerate(stages))[self.done :]

    def solve_stage(self, stage: Stage) -> list[LinearRecord]:
        """Solve a stage: importance, Hessian, error propagation, codes, written.

        Raises
        ------
        BudgetError
            Memory ran out, in a pass even with one unit in flight.
        NumericalError
            NaN or infinity appeared.
        """
        solved = any(linear.name in self.quantized for linear in stage.linears)
        first = self.run.job.architecture.stages(self.index)[0]
        if not solved and stage is not first and not stage.writes:
            return []  # the other passes leave something for the stages after them
        try:
            with self.run.passes.profiler.stage(f"{stage.name}: pass"):
                statistics = self.statistics.gather(stage)
            # What the pass took is free, and not of the sizes that the solver takes.
            trim_heap()
            self.run.passes.check()
            return [
                record
                for group in stage.groups
                for record in self._solve_group(stage, group, statistics[group])
            ]
        except torch.OutOfMemoryError as error:  # not in its pass, which has fewer
            raise BudgetError(
                f"block {self.index}, {stage.name}: memory ran out while"
                " a linear was solved; free some of it, or give a larger --vram:"
                " the same command goes on"
            ) from error

    def _solve_group(
        self, stage: Stage, group: Group, statistics: Statistics
    ) -> Iterator[LinearRecord]:
        profiler, write = self.run.passes.profiler, self.run.codes.write
        with profiler.stage(f"{stage.name}: factorise"):
            equations = self._factorised(stage, group, statistics)
        write_solution = solution_writer(self.run, self.index, write)
        for linear in group.linears:
            if linear.name not in self.quantized:
                continue
            with profiler.stage(f"{stage.name}: solve {linear.role}"):
                solution = self._solve_linear(linear, equations)
                write_solution(linear.name, solution)
            factor = equations.factor
            made = record(
                self.index,
                linear.name,
                self.quantized[linear.name][0],
                solution,
                damping=factor.damping,
                attempts=factor.attempts,
                dead_inputs=factor.dead_inputs,
            )
            del solution  # its codes would stay while the next linear is solved
            yield made

    def _factorised(
        self, stage: Stage, group: Group, statistics: Statistics
    ) -> "_Equations":
        """Order and factorise a group's Hessian."""
        plan, pool = self.run.job.plan, self.run.passes.pool
        hessian, cross_term = statistics
        linears = [linear for linear in group.linears if linear.name in self.quantized]
        order_I = None
        if plan.act_order and linears:
            # One for the group: the plan allows no group sizes of linears' own.
            group_size = self.quantized[linears[0].name][0].group_size
            order_I = group_aware_order(hessian.matrix_II.diagonal(), group_size)
            reorder(hessian, order_I)
            if cross_term is not None:
                cross_term.reorder(order_I)
        try:
            damping = plan.damping_for(hessian.matrix_II.shape[0])
            factor = factorise(hessian, damping, plan.tile_columns, pool)
        except NumericalError as error:
            where = f"block {self.index}, {stage.name}"
            raise NumericalError(f"{where}: {error}") from error
        return _Equations(factor, cross_term, order_I)

    def _solve_linear(self, linear: Linear, equations: "_Equations") -> Solution:
        """Solve a linear, and put its decoded weights into the quantized stream."""
        plan, (scheme, grid) = self.run.job.plan, self.quantized[linear.name]
        factor, cross_term, order_I = equations
        weight_OI = self.weights.pop(linear.name)
        share = plan.propagate_share(block_prefix(self.index) + linear.name)

        def target(weight_RI: Tensor, rows: slice) -> Tensor:
            target_RI = weight_RI if order_I is None else weight_RI[:, order_I]
            if cross_term is None or share == 0:
                return target_RI
            return cross_term.correction(weight_RI, rows, factor, share).add_(target_RI)

        try:
            solution = solve(
                weight_OI,
                factor,
                grid,
                scheme.group_size,
                dynamic_scales=plan.group_scales == "dynamic",
                tile_rows=plan.tile_rows_of(weight_OI.shape[1]),
                pool=self.run.passes.pool,
                sweeps=plan.sweeps,
                refit=plan.refit,
                target=target,
            )
        except NumericalError as error:
            where = f"block {self.index}, {linear.name}"
            raise NumericalError(f"{where}: {error}") from error
        del weight_OI  # what is decoded takes its place
        if order_I is not None:
            solution = put_back(solution, order_I)
        block = self.streams[0].block
        kind = block.weight(linear.name).dtype
        block.replace_weight(linear.name, decoded(solution, grid, kind))
        return solution

    def write_outputs(self) -> None:
        """Write the block's outputs, the next block's input, of all streams."""
        with self.run.passes.profiler.stage("outputs: pass"):
            for stream in self.streams:
                advance = partial(stream.advance, self.run.passes, self.index)
                where = f"block {self.index}, outputs"
                self.run.passes.retry_with_fewer(advance, where)


class _Equations(NamedTuple):
    """What the linears of a group are solved with."""

    factor: Factor
    cross_term: CrossTerm | None
    order_I: Tensor | None
    """The order of the factor's columns, where it is not the model's."""


def round_block(
    run: QuantizationRun, index: int, tensors: dict[str, Tensor]
) -> list[LinearRecord]:
    """Quantize a block by rounding alone: no activations, no Hessian.

    Linears come to the device one by one, where they are not there already.
    """
    quantized = schemes_and_grids(run, index, tensors)
    place = "cpu" if run.job.execution.offloads_weights else run.device
    weights = {name: tensors.pop(f"{name}.weight").to(place) for name in quantized}
    tensors.clear()
    write_solution = solution_writer(run, index, run.output.write)
    records = []
    for linear, (scheme, grid) in quantized.items():
        run.passes.check()
        weight_OI = weights.pop(linear).to(run.device)
        solution = round_to_nearest(
            weight_OI,
            grid,
            scheme.group_size,
            tile_rows=run.job.plan.tile_rows_of(weight_OI.shape[1]),
            pool=run.passes.pool,
        )
        write_solution(linear, solution)
        records.append(record(index, linear, scheme, solution))
    return records


def record(
    index: int,
    linear: str,
    scheme: Scheme,
    solution: Solution,
    *,
    damping: float = 0.0,
    attempts: int = 0,
    dead_inputs: int = 0,
) -> LinearRecord:
    """Describe what was done to a linear, for journal and output."""
    return LinearRecord(
        block=index,
        name=block_prefix(index) + linear,
        bits=scheme.bits,
        group_size=scheme.group_size,
        relative_error=solution.relative_error,
        rounding_error=solution.rounding_error,
        kept_rounding=solution.kept_rounding,
        damping=damping,
        damping_attempts=attempts,
        dead_inputs=dead_inputs,
    )
