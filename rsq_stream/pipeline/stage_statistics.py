"""What one pass over the calibration set gathers for a stage of a block.

The Hessian of the stage's input, in the first stage the tokens' importance too, and
with two streams the cross_term between them.
"""

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.error_propagation import (
    CrossTerm,
    StageInput,
    cross_term_error,
)
from rsq_stream.algorithm.gptq.hessian import Hessian, flat
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.families.base import Group, Stage
from rsq_stream.pipeline.activations.calibration_pass import CalibrationPasses
from rsq_stream.pipeline.activations.finite_check import FiniteWatch
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.pipeline.run import Run
from rsq_stream.pipeline.token_importance import TokenImportance, TokenWeights


class Statistics(NamedTuple):
    """What the solver needs to know of a group's inputs."""

    hessian: Hessian
    cross_term: CrossTerm | None
    """With two streams, the cross term between them."""


@dataclass(kw_only=True)
class StageStatistics:
    """The statistics of one block's stages, from the streams as they are."""

    run: Run
    index: int
    streams: list[Stream]
    """The quantized stream; with error propagation the full-precision one too."""
    importance: TokenImportance
    known_BT: InitVar[Tensor | None] = None
    """Token weights of a first stage that is done already."""
    token_weights: TokenWeights = field(init=False)
    """Filled by the first stage."""

    def __post_init__(self, known_BT: Tensor | None) -> None:
        plan = self._plan
        if known_BT is None:
            size = plan.sequences, plan.sequence_length
            device = self.streams[0].block.device
            kept = torch.float32 if plan.importance_exact else torch.bfloat16
            known_BT = torch.zeros(size, dtype=kept, device=device)
        self.token_weights = TokenWeights(known_BT, plan.unit_sequences)

    @property
    def _plan(self) -> QuantizationPlan:
        return self.run.job.plan

    @property
    def _passes(self) -> CalibrationPasses:
        return self.run.passes

    @property
    def _first(self) -> Stage:
        """The stage whose pass weighs the tokens."""
        return self.run.job.architecture.stages(self.index)[0]

    def weigh(self) -> TokenWeights:
        """Return the tokens' weights alone; q and k must be those of the source."""

        def one(unit: int, x_BTD: Tensor) -> None:
            made = self.streams[0].stage_input(self._first, unit, x_BTD)
            self._weigh(unit, x_BTD, made)

        self.streams[0].each(self._passes, self.index, "token weights", one)
        return self.token_weights

    def gather(self, stage: Stage) -> Mapping[Group, Statistics]:
        """Make a stage's pass; it begins anew where memory runs out in it.

        Raises
        ------
        BudgetError
            Not even one unit at a time fits.
        """

        def once() -> Mapping[Group, Statistics]:
            if stage.writes:
                for stream in self.streams:
                    stream.slots.h.renew()
            return self.accumulate(stage)

        return self._passes.retry_with_fewer(once, f"block {self.index}, {stage.name}")

    def accumulate(self, stage: Stage) -> Mapping[Group, Statistics]:
        """Make one pass over the calibration set, and return a stage's statistics."""
        plan, device = self._plan, self.streams[0].block.device
        (group,) = stage.groups
        first = group.linears[0].name
        outputs, columns = self.streams[0].block.weight(first).shape
        hessian = Hessian(columns, plan.hessian_panel, device)
        cross_term, alone = None, None
        weight = self._stage_weight(first)
        watch = FiniteWatch(
            self.index,
            stage.name,
            sequences=plan.sequences,
            tokens=plan.sequence_length,
            device=device,
        )
        if plan.streams > 1:
            # Linears that share their input share C - H; o and down have a G each.
            # The last stream holds the source's weights.
            if group.alone:
                alone = self.streams[-1].block.weight(first)
            cross_term = CrossTerm(
                outputs if alone is not None else None,
                columns,
                plan.hessian_panel,
                device,
            )

        def one(unit: int, *read: Tensor) -> tuple[Tensor, Tensor | None]:
            made = [
                stream.stage_input(stage, unit, x_BTD.to(device))
                for stream, x_BTD in zip(self.streams, read, strict=True)
            ]
            if stage is self._first:
                self._weigh(unit, read[0], made[0])
            sequence = unit * plan.unit_sequences
            for stream in made:
                watch.see(stream.value_BTI, sequence)
            u_TI = flat(made[0].value_BTI)
            if cross_term is None:
                return u_TI, None
            if not plan.residual_correction:
                made = [StageInput(stream.value_BTI) for stream in made]
            return u_TI, cross_term_error(made[0], made[1], weight(unit), alone)

        slots = [stream.slot(stage) for stream in self.streams]
        for run in self._passes.run(slots, self.index, stage.name, one):
            # No names: they would keep a run in memory while the next one is made.
            hessian.add(
                [(u_TI, weight(unit)) for unit, (u_TI, _) in run], self._passes.pool
            )
            if cross_term is not None:
                cross_term.add(
                    [(error, u_TI) for _, (u_TI, error) in run if error is not None],
                    self._passes.pool,
                )
        watch.require()
        return {group: Statistics(hessian, cross_term)}

    def _stage_weight(self, linear: str) -> Callable[[int], Tensor]:
        """Return what weighs a unit's tokens: all alike, if the linear is left out."""
        if self._plan.weighs(linear):
            return self.token_weights.of_unit
        return lambda unit: torch.ones_like(self.token_weights.of_unit(unit))

    def _weigh(self, unit: int, x_BTD: Tensor, attention_in: StageInput) -> None:
        """Keep the importance of a unit's tokens, once per block."""
        block = self.streams[0].block
        x_BTD = x_BTD.to(attention_in.value_BTI)
        weight_BT = self.importance.weights(unit, block, x_BTD, attention_in.value_BTI)
        self.token_weights.put(unit, weight_BT)
