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
from rsq_stream.algorithm.solver import Solution, round_to_nearest, solve
from rsq_stream.config import QuantizationPlan
from rsq_stream.errors import NumericalError
from rsq_stream.events import LinearRecord
from rsq_stream.model.architecture import STAGES, Stage, block_prefix
from rsq_stream.model.block import Block
from rsq_stream.packed_format import scheme_for
from rsq_stream.passes import Passes, flat, require_finite
from rsq_stream.slots import Slots
from rsq_stream.storage.activations import Slot

Keep = Callable[[str, Solution], None]
FinishStage = Callable[[int, list[LinearRecord], "TokenWeights"], None]
WRITES_H = 2
"""The stage whose pass writes h."""
TokenWeights = dict[int, Tensor]
"""Importance of a block's tokens, end to end, by unit; exact in bf16."""


def make_grid(plan: QuantizationPlan, storage_type: torch.dtype) -> Grid:
    """Give the grid that a plan names, for weights of that stored type."""
    return Grid(
        bits=plan.bits,
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
    block: Block
    weights: dict[str, Tensor]
    """fp32 weights by linear; each is dropped when it is solved."""
    grids: dict[str, Grid]
    plan: QuantizationPlan
    slots: Slots
    passes: Passes
    keep: Keep
    finish_stage: FinishStage
    token_weights: TokenWeights = field(default_factory=dict)
    """Filled by the first stage, or given where that one is done already."""
    records: list[LinearRecord] = field(default_factory=list)
    _attention: dict[int, Tensor] = field(default_factory=dict)

    def run(self, done: int) -> list[LinearRecord]:
        """Solve all stages but the first ``done``, and write the block's outputs.

        The linears of the stages that are done must hold their quantized weights.
        Gives the records of the others.
        """
        inputs = (
            (self.slots.x, self._attention_in),
            (self.slots.x, self._attention_out),
            (self.slots.x, self._mlp_in),
            (self.slots.h, self._mlp_out),
        )
        for number in range(done, len(STAGES)):
            before = len(self.records)
            if number == WRITES_H:
                self.slots.h.renew()
            self._solve_stage(STAGES[number], *inputs[number])
            self.finish_stage(number, self.records[before:], self.token_weights)
        self.advance()
        return self.records

    def weigh(self) -> TokenWeights:
        """Give the tokens' weights alone; q and k must be those of the source."""
        self._replay("token weights", self._attention_in)
        return self.token_weights

    def replay_h(self) -> None:
        """Write h once more, by the quantized weights that the block holds."""
        self.slots.h.renew()
        self._replay("h", self._mlp_in)
        self.slots.h.flush(durable=True)

    def _replay(self, what: str, function: Callable[[int, Tensor], Tensor]) -> None:
        device = self.block.weight("mlp.down_proj").device

        def one(unit: int, x_BTD: Tensor) -> None:
            function(unit, x_BTD.to(device))

        for _ in self.passes.over(self.slots.x, self.index, what, one):
            pass

    def _solve_stage(
        self, stage: Stage, slot: Slot, stage_input: Callable[[int, Tensor], Tensor]
    ) -> None:
        columns = self.weights[stage.linears[0]].shape[1]
        device = self.weights[stage.linears[0]].device
        hessian = Hessian(columns, self.plan.hessian_panel, device)

        def one(unit: int, x_BTD: Tensor) -> Tensor:
            first = unit * slot.shape.unit_sequences
            value = stage_input(unit, x_BTD.to(device))
            return require_finite(value, self.index, stage.name, first)

        for run in self.passes.over(slot, self.index, stage.name, one):
            units = [(flat(value), self.token_weights[unit]) for unit, value in run]
            hessian.add(units, self.passes.pool)
        self.passes.check()
        pool = self.passes.pool
        try:
            factor = factorise(hessian, self.plan.damping, self.plan.tile_columns, pool)
        except NumericalError as error:
            where = f"block {self.index}, {stage.name}"
            raise NumericalError(f"{where}: {error}") from error
        for linear in stage.linears:
            solution = solve(
                self.weights.pop(linear),
                factor,
                self.grids[linear],
                scheme_for(self.plan, columns).group_size,
                dynamic_scales=self.plan.group_scales == "dynamic",
                tile_rows=self.plan.tile_rows,
                pool=pool,
            )
            self.block.replace_weight(linear, decoded(solution, self.grids[linear]))
            self.keep(linear, solution)
            self.records.append(
                record(
                    self.index,
                    linear,
                    self.plan,
                    solution,
                    damping=factor.damping,
                    attempts=factor.attempts,
                    dead_inputs=factor.dead_inputs,
                )
            )

    def _attention_in(self, unit: int, x_BTD: Tensor) -> Tensor:
        """Give a, and keep the importance of the unit's tokens, once per block."""
        a_BTD = self.block.attention_input(self._computed(x_BTD))
        self.token_weights[unit] = self._weigh(a_BTD).reshape(-1)
        return a_BTD

    def _weigh(self, a_BTD: Tensor) -> Tensor:
        sequences, tokens = a_BTD.shape[:2]
        plan = self.plan
        if plan.importance == "attncon":
            score_BT = importance.attention_concentration(self.block.column_sums(a_BTD))
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
        return importance.rounded(weight_BT)

    def _attention_out(self, unit: int, x_BTD: Tensor) -> Tensor:
        """Give c, by the quantized q, k, v."""
        a_BTD = self.block.attention_input(self._computed(x_BTD))
        c_BTI = self._stored(self.block.attention_output(a_BTD))
        if unit < self.slots.resident:
            self._attention[unit] = c_BTI.to("cpu")
        return self._computed(c_BTI)

    def _mlp_in(self, unit: int, x_BTD: Tensor) -> Tensor:
        """Give m, by the quantized o; h is kept for the passes that follow."""
        x_BTD = self._computed(x_BTD)
        if unit in self._attention:
            c_BTI = self._computed(self._attention.pop(unit).to(x_BTD.device))
        else:
            c_BTI = self._attention_out(unit, x_BTD)
            self._attention.pop(unit, None)
        h_BTD = self._stored(self.block.after_attention(x_BTD, c_BTI))
        self.slots.h.write(unit, h_BTD, durable=True)
        return self.block.mlp_input(self._computed(h_BTD))

    def _mlp_out(self, unit: int, h_BTD: Tensor) -> Tensor:
        """Give u, by the quantized gate and up."""
        del unit
        return self.block.mlp_output(self.block.mlp_input(self._computed(h_BTD)))

    def advance(self) -> None:
        """Write x' of the quantized block, durably: the next block's input."""
        device = self.block.weight("mlp.down_proj").device
        slots = self.slots
        slots.x_next.renew()

        def one(unit: int, h_BTD: Tensor) -> Tensor:
            h_BTD = h_BTD.to(device)
            u_BTI = self._mlp_out(unit, h_BTD)
            x_BTD = self.block.after_mlp(self._computed(h_BTD), u_BTI)
            return self._stored(x_BTD)

        for run in self.passes.over(slots.h, self.index, "outputs", one):
            for unit, x_BTD in run:
                first = unit * slots.h.shape.unit_sequences
                require_finite(x_BTD, self.index, "outputs", first)
                slots.x_next.write(unit, x_BTD, durable=True)
        slots.x_next.flush(durable=True)
        slots.h.clear()

    def _computed(self, x: Tensor) -> Tensor:
        """Bring stored activations into the type that is computed in."""
        return x.to(getattr(torch, self.plan.compute_type))

    def _stored(self, x: Tensor) -> Tensor:
        """Round to the cache type: what a resumed pass would read is what is used."""
        return x.to(getattr(torch, self.plan.cache_type))


def decoded(solution: Solution, grid: Grid) -> Tensor:
    """Give the weights as a loader will see them, fp32."""
    return decode(
        solution.code_OI, solution.scale_OG, solution.zero_OG, grid.storage_type
    )


def round_block(
    index: int,
    weights: dict[str, Tensor],
    grids: dict[str, Grid],
    plan: QuantizationPlan,
    passes: Passes,
    keep: Keep,
) -> list[LinearRecord]:
    """Quantize a block by rounding alone: no activations, no Hessian."""
    records = []
    for linear in [name for stage in STAGES for name in stage.linears]:
        passes.check()
        weight_OI = weights.pop(linear)
        group_size = scheme_for(plan, weight_OI.shape[1]).group_size
        solution = round_to_nearest(
            weight_OI, grids[linear], group_size, plan.tile_rows, passes.pool
        )
        keep(linear, solution)
        records.append(record(index, linear, plan, solution))
    return records


def record(
    index: int,
    linear: str,
    plan: QuantizationPlan,
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
        bits=plan.bits,
        group_size=scheme_for(plan, solution.code_OI.shape[1]).group_size,
        relative_error=solution.relative_error,
        rounding_error=solution.rounding_error,
        kept_rounding=solution.kept_rounding,
        damping=damping,
        damping_attempts=attempts,
        dead_inputs=dead_inputs,
    )
