"""Solve one block: per stage importance -> Hessian -> solve, then its outputs.

A stage is the linears that share one input. Each pass sees the weights that the
stages before it left behind, so o is solved on what quantized q, k, v give, and
down on what quantized gate and up give: true-sequential, with partial forwards.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.act_order import group_aware_order, put_back, reorder
from rsq_stream.algorithm.gptq.error_propagation import Drift
from rsq_stream.algorithm.gptq.ldl import Factor, factorise
from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.gptq.solver import Solution, decoded, solve
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import BudgetError, NumericalError
from rsq_stream.events import LinearRecord
from rsq_stream.model.families.base import STAGES, WRITES_H
from rsq_stream.model.tensor_names import block_prefix, role
from rsq_stream.pipeline.activations.calibration_pass import Passes
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.pipeline.stage_statistics import StageStatistics
from rsq_stream.pipeline.token_importance import TokenWeights
from rsq_stream.runtime.host_memory import give_back_free_memory

Keep = Callable[[str, Solution], None]
FinishStage = Callable[[int, list[LinearRecord], TokenWeights], None]


@dataclass
class BlockSolver:
    """One block on its way from full precision to codes."""

    index: int
    streams: list[Stream]
    """The quantized stream; with error propagation the full-precision one too."""
    weights: dict[str, Tensor]
    """fp32 weights by linear, mostly in host memory; each is dropped when solved."""
    schemes: dict[str, Scheme]
    """How each linear is quantized; those that are kept are absent."""
    grids: dict[str, Grid]
    plan: QuantizationPlan
    passes: Passes
    keep: Keep
    finish_stage: FinishStage
    statistics: StageStatistics
    records: list[LinearRecord] = field(default_factory=list)

    def run(self, done: int) -> list[LinearRecord]:
        """Solve all stages but the first ``done``, and write the block's outputs.

        The linears of the stages that are done must hold their quantized weights.
        Gives the records of the others.

        Raises
        ------
        BudgetError
            Memory ran out, in a pass even with one unit in flight.
        NumericalError
            NaN or infinity appeared.
        """
        for number in range(done, len(STAGES)):
            before = len(self.records)
            try:
                self._solve_stage(number)
            except torch.OutOfMemoryError as error:  # not in its pass, which has fewer
                raise BudgetError(
                    f"block {self.index}, {STAGES[number].name}: memory ran out while"
                    " a linear was solved; free some of it, or give a larger --vram:"
                    " the same command goes on"
                ) from error
            made = self.records[before:]
            self.finish_stage(number, made, self.statistics.token_weights)
        with self.passes.meter.stage("outputs: pass"):
            for stream in self.streams:
                advance = partial(stream.advance, self.passes, self.index)
                self.passes.with_fewer(advance, f"block {self.index}, outputs")
        return self.records

    def _solve_stage(self, number: int) -> None:
        stage, pool = STAGES[number], self.passes.pool
        linears = [linear for linear in stage.linears if linear in self.schemes]
        if not linears and number not in (0, WRITES_H):
            return  # these two passes leave something for the others
        meter = self.passes.meter
        with meter.stage(f"{stage.name}: pass"):
            hessian, drift = self.statistics.gather(number)
        # What the pass took is free, and not of the sizes that the solver takes.
        give_back_free_memory()
        self.passes.check()
        with meter.stage(f"{stage.name}: factorise"):
            order_I = None
            if self.plan.act_order and linears:
                # One for the stage: the plan allows no group sizes of linears' own.
                group_size = self.schemes[linears[0]].group_size
                order_I = group_aware_order(hessian.matrix_II.diagonal(), group_size)
                reorder(hessian, order_I)
                if drift is not None:
                    drift.reorder(order_I)
            try:
                damping = self.plan.damping_for(hessian.matrix_II.shape[0])
                factor = factorise(hessian, damping, self.plan.tile_columns, pool)
            except NumericalError as error:
                where = f"block {self.index}, {stage.name}"
                raise NumericalError(f"{where}: {error}") from error
        for linear in linears:
            with meter.stage(f"{stage.name}: solve {role(linear)}"):
                self._solve_linear(linear, factor, drift, order_I)

    def _solve_linear(
        self, linear: str, factor: Factor, drift: Drift | None, order_I: Tensor | None
    ) -> None:
        weight_OI = self.weights.pop(linear)
        share = self.plan.propagate_share(block_prefix(self.index) + linear)

        def target(weight_RI: Tensor, rows: slice) -> Tensor:
            target_RI = weight_RI if order_I is None else weight_RI[:, order_I]
            if drift is None or share == 0:
                return target_RI
            return drift.correction(weight_RI, rows, factor, share).add_(target_RI)

        try:
            solution = solve(
                weight_OI,
                factor,
                self.grids[linear],
                self.schemes[linear].group_size,
                dynamic_scales=self.plan.group_scales == "dynamic",
                tile_rows=self.plan.tile_rows_of(weight_OI.shape[1]),
                pool=self.passes.pool,
                sweeps=self.plan.sweeps,
                refit=self.plan.refit,
                target=target,
            )
        except NumericalError as error:
            where = f"block {self.index}, {linear}"
            raise NumericalError(f"{where}: {error}") from error
        del weight_OI  # what is decoded takes its place
        if order_I is not None:
            solution = put_back(solution, order_I)
        block = self.streams[0].block
        kind = block.weight(linear).dtype
        block.replace_weight(linear, decoded(solution, self.grids[linear], kind))
        self.keep(linear, solution)
        self.records.append(
            record(
                self.index,
                linear,
                self.schemes[linear],
                solution,
                damping=factor.damping,
                attempts=factor.attempts,
                dead_inputs=factor.dead_inputs,
            )
        )


def round_block(
    index: int,
    weights: dict[str, Tensor],
    schemes: dict[str, Scheme],
    grids: dict[str, Grid],
    tile_rows_of: Callable[[int], int],
    device: torch.device,
    passes: Passes,
    keep: Keep,
) -> list[LinearRecord]:
    """Quantize a block by rounding alone: no activations, no Hessian.

    Linears come to the device one by one, where they are not there already.
    """
    records = []
    for linear, scheme in schemes.items():
        passes.check()
        weight_OI = weights.pop(linear).to(device)
        rows = tile_rows_of(weight_OI.shape[1])
        solution = round_to_nearest(
            weight_OI, grids[linear], scheme.group_size, rows, passes.pool
        )
        keep(linear, solution)
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
