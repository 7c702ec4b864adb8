"""Solve one block: per stage importance -> Hessian -> solve, then its outputs.

A stage is the linears that share one input. Each pass sees the weights that the
stages before it left behind, so o is solved on what quantized q, k, v give, and
down on what quantized gate and up give: true-sequential, with partial forwards.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsq_stream.algorithm import importance
from rsq_stream.algorithm.factor import factorise
from rsq_stream.algorithm.grid import Grid, decode
from rsq_stream.algorithm.hessian import Hessian
from rsq_stream.algorithm.order import group_aware_order, put_back, reorder
from rsq_stream.algorithm.propagation import Drift, stream_error
from rsq_stream.algorithm.solver import Solution, round_to_nearest, solve
from rsq_stream.config import QuantizationPlan
from rsq_stream.errors import NumericalError
from rsq_stream.events import LinearRecord
from rsq_stream.model.architecture import STAGES, block_prefix
from rsq_stream.passes import Passes, flat, require_finite
from rsq_stream.schemes import Scheme
from rsq_stream.streams import WRITES_H, StageInput, Stream

Keep = Callable[[str, Solution], None]
FinishStage = Callable[[int, list[LinearRecord], "TokenWeights"], None]
TokenWeights = dict[int, Tensor]
"""Importance of a block's tokens, end to end, by unit; exact in bf16."""


def make_grid(plan: QuantizationPlan, bits: int, storage_type: torch.dtype) -> Grid:
    """Give the grid of a plan and a scheme's bits, for weights of that stored type."""
    return Grid(
        bits=bits,
        symmetric=plan.symmetric,
        signed_scales=plan.signed_scales,
        clip_exponent=plan.clip_exponent,
        clip_steps=plan.clip_steps,
        storage_type=storage_type,
    )


@dataclass
class BlockSolver:
    """One block on its way from full precision to codes."""

    index: int
    streams: list[Stream]
    """The quantized stream; with error propagation the full-precision one too."""
    weights: dict[str, Tensor]
    """fp32 weights by linear; each is dropped when it is solved."""
    schemes: dict[str, Scheme]
    """How each linear is quantized; those that are kept are absent."""
    grids: dict[str, Grid]
    plan: QuantizationPlan
    passes: Passes
    keep: Keep
    finish_stage: FinishStage
    token_weights: TokenWeights = field(default_factory=dict)
    """Filled by the first stage, or given where that one is done already."""
    records: list[LinearRecord] = field(default_factory=list)

    def run(self, done: int) -> list[LinearRecord]:
        """Solve all stages but the first ``done``, and write the block's outputs.

        The linears of the stages that are done must hold their quantized weights.
        Gives the records of the others.
        """
        for number in range(done, len(STAGES)):
            before = len(self.records)
            if number == WRITES_H:
                for stream in self.streams:
                    stream.slots.h.renew()
            self._solve_stage(number)
            self.finish_stage(number, self.records[before:], self.token_weights)
        for stream in self.streams:
            stream.advance(self.passes, self.index)
        return self.records

    def weigh(self) -> TokenWeights:
        """Give the tokens' weights alone; q and k must be those of the source."""

        def one(unit: int, x_BTD: Tensor) -> None:
            self._weigh(unit, self.streams[0].stage_input(0, unit, x_BTD))

        self.streams[0].each(self.passes, self.index, "token weights", one)
        return self.token_weights

    def _solve_stage(self, number: int) -> None:
        stage, pool = STAGES[number], self.passes.pool
        linears = [linear for linear in stage.linears if linear in self.schemes]
        if not linears and number not in (0, WRITES_H):
            return  # these two passes leave something for the others
        hessian, drift = self._accumulate(number)
        self.passes.check()
        order_I = None
        if self.plan.act_order and linears:
            # One for the stage: the plan allows no group sizes of linears' own.
            group_size = self.schemes[linears[0]].group_size
            order_I = group_aware_order(hessian.matrix_II.diagonal(), group_size)
            reorder(hessian, order_I)
            if drift is not None:
                drift.reorder(order_I)
        try:
            factor = factorise(hessian, self.plan.damping, self.plan.tile_columns, pool)
        except NumericalError as error:
            where = f"block {self.index}, {stage.name}"
            raise NumericalError(f"{where}: {error}") from error
        for linear in linears:
            weight_OI = target_OI = self.weights.pop(linear)
            if order_I is not None:
                target_OI = weight_OI[:, order_I]
            if drift is not None:
                target_OI = target_OI + drift.correction(
                    weight_OI, factor, self.plan.propagate, self.plan.tile_rows, pool
                )
            solution = solve(
                target_OI,
                factor,
                self.grids[linear],
                self.schemes[linear].group_size,
                dynamic_scales=self.plan.group_scales == "dynamic",
                tile_rows=self.plan.tile_rows,
                pool=pool,
                sweeps=self.plan.sweeps,
                refit=self.plan.refit,
            )
            if order_I is not None:
                solution = put_back(solution, order_I)
            self.streams[0].block.replace_weight(
                linear, decoded(solution, self.grids[linear])
            )
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

    def _accumulate(self, number: int) -> tuple[Hessian, Drift | None]:
        """One pass over the calibration set: a stage's statistics."""
        stage, plan, device = STAGES[number], self.plan, self.streams[0].block.device
        outputs, columns = self.weights[stage.linears[0]].shape
        hessian = Hessian(columns, plan.hessian_panel, device)
        drift, alone = None, None
        if plan.propagate > 0:
            # Linears that share their input share C - H; o and down have a G each.
            alone = self.weights[stage.linears[0]] if len(stage.linears) == 1 else None
            drift = Drift(
                outputs if alone is not None else None,
                columns,
                plan.hessian_panel,
                device,
            )

        def one(unit: int, *read: Tensor) -> tuple[Tensor, Tensor | None]:
            made = [
                stream.stage_input(number, unit, x_BTD.to(device))
                for stream, x_BTD in zip(self.streams, read, strict=True)
            ]
            if number == 0:
                self._weigh(unit, made[0])
            first = unit * plan.unit_sequences
            u_TI = flat(
                require_finite(made[0].value_BTI, self.index, stage.name, first)
            )
            if drift is None:
                return u_TI, None
            return u_TI, drift_error(made[0], made[1], self.token_weights[unit], alone)

        slots = [stream.slot(number) for stream in self.streams]
        for run in self.passes.over(slots, self.index, stage.name, one):
            units = [(u_TI, self.token_weights[unit]) for unit, (u_TI, _) in run]
            hessian.add(units, self.passes.pool)
            if drift is not None:
                errors = [
                    (error, u_TI) for _, (u_TI, error) in run if error is not None
                ]
                drift.add(errors, self.passes.pool)
        return hessian, drift

    def _weigh(self, unit: int, attention_in: StageInput) -> None:
        """Keep the importance of a unit's tokens, once per block."""
        a_BTD, plan = attention_in.value_BTI, self.plan
        sequences, tokens = a_BTD.shape[:2]
        if plan.importance == "attncon":
            sums_BT = self.streams[0].block.column_sums(a_BTD)
            score_BT = importance.attention_concentration(sums_BT)
            spread_BT = importance.affine(
                score_BT, plan.importance_min, plan.importance_max
            )
            weight_BT = importance.mean_one(spread_BT)
        elif plan.importance == "first-n":
            weight_BT = importance.first_tokens(
                sequences, tokens, plan.importance_tokens
            ).to(a_BTD.device)
        else:
            weight_BT = torch.ones(sequences, tokens, device=a_BTD.device)
        self.token_weights[unit] = importance.rounded(weight_BT).reshape(-1)


def drift_error(
    quantized: StageInput,
    full: StageInput,
    weight_T: Tensor,
    weight_OI: Tensor | None,
) -> Tensor:
    """Give what a unit adds to a stage's drift, for each token: w times the error.

    That of the input, or with ``weight_OI`` that of the output and its residual.
    """
    weighted_TI = stream_error(
        flat(full.value_BTI), flat(quantized.value_BTI), weight_T
    )
    if weight_OI is None:
        return weighted_TI
    error_TO = weighted_TI @ weight_OI.T
    if quantized.residual_BTD is not None and full.residual_BTD is not None:
        residuals = flat(full.residual_BTD), flat(quantized.residual_BTD)
        error_TO += stream_error(*residuals, weight_T)
    return error_TO


def decoded(solution: Solution, grid: Grid) -> Tensor:
    """Give the weights as a loader will see them, fp32."""
    return decode(
        solution.code_OI, solution.scale_OG, solution.zero_OG, grid.storage_type
    )


def round_block(
    index: int,
    weights: dict[str, Tensor],
    schemes: dict[str, Scheme],
    grids: dict[str, Grid],
    tile_rows: int,
    passes: Passes,
    keep: Keep,
) -> list[LinearRecord]:
    """Quantize a block by rounding alone: no activations, no Hessian."""
    records = []
    for linear, scheme in schemes.items():
        passes.check()
        weight_OI = weights.pop(linear)
        solution = round_to_nearest(
            weight_OI, grids[linear], scheme.group_size, tile_rows, passes.pool
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
