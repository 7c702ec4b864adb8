"""What one pass over the calibration set gathers for a stage of a block.

The Hessian of the stage's input, in the first stage the tokens' importance too, and
with two streams the drift between them.
"""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.gptq.error_propagation import Drift, stream_error
from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.architecture import STAGES, WRITES_H
from rsq_stream.ops.two_terms import add_product, two_terms
from rsq_stream.pipeline.activations.calibration_pass import FiniteWatch, Passes, flat
from rsq_stream.pipeline.activations.stream import StageInput, Stream
from rsq_stream.pipeline.token_importance import TokenImportance
from rsq_stream.planning.memory.forward import OUTPUTS


class TokenWeights:
    """Importance of a block's tokens: one tensor, bf16 or for exact weights fp32.

    A tensor per unit would lie between what a pass allocates and gives back, and the
    heap would grow with every unit.
    """

    def __init__(self, weight_BT: Tensor, unit_sequences: int) -> None:
        """Take weights ``[sequences, tokens]``, those of a unit in a row."""
        self.weight_BT = weight_BT
        self._unit_sequences = unit_sequences

    def of_unit(self, unit: int) -> Float[Tensor, "T"]:
        """Give a unit's weights end to end, in fp32."""
        return self._rows(unit).float().reshape(-1)

    def put(self, unit: int, weight_BT: Float[Tensor, "B T"]) -> None:
        """Keep a unit's weights, which the type is exact for."""
        self._rows(unit).copy_(weight_BT)

    def _rows(self, unit: int) -> Tensor:
        first = unit * self._unit_sequences
        return self.weight_BT[first : first + self._unit_sequences]


@dataclass
class StageStatistics:
    """The statistics of one block's stages, from the streams as they are."""

    index: int
    streams: list[Stream]
    """The quantized stream; with error propagation the full-precision one too."""
    plan: QuantizationPlan
    passes: Passes
    importance: TokenImportance
    known_BT: InitVar[Tensor | None] = None
    """Token weights of a first stage that is done already."""
    token_weights: TokenWeights = field(init=False)
    """Filled by the first stage."""

    def __post_init__(self, known_BT: Tensor | None) -> None:
        if known_BT is None:
            size = self.plan.sequences, self.plan.sequence_length
            device = self.streams[0].block.device
            kept = torch.float32 if self.plan.importance_exact else torch.bfloat16
            known_BT = torch.zeros(size, dtype=kept, device=device)
        self.token_weights = TokenWeights(known_BT, self.plan.unit_sequences)

    def weigh(self) -> TokenWeights:
        """Give the tokens' weights alone; q and k must be those of the source."""

        def one(unit: int, x_BTD: Tensor) -> None:
            self._weigh(unit, x_BTD, self.streams[0].stage_input(0, unit, x_BTD))

        self.streams[0].each(self.passes, self.index, "token weights", one)
        return self.token_weights

    def gather(self, number: int) -> tuple[Hessian, Drift | None]:
        """Make a stage's pass; it begins anew where memory runs out in it.

        Raises
        ------
        BudgetError
            Not even one unit at a time fits.
        """

        def once() -> tuple[Hessian, Drift | None]:
            if number == WRITES_H:
                for stream in self.streams:
                    stream.slots.h.renew()
            return self.accumulate(number)

        return self.passes.with_fewer(
            once, f"block {self.index}, {STAGES[number].name}"
        )

    def accumulate(self, number: int) -> tuple[Hessian, Drift | None]:
        """One pass over the calibration set: a stage's statistics."""
        stage, plan, device = STAGES[number], self.plan, self.streams[0].block.device
        first = stage.linears[0]
        outputs, columns = self.streams[0].block.weight(first).shape
        hessian = Hessian(columns, plan.hessian_panel, device)
        drift, alone = None, None
        weight = self._stage_weight(first)
        size = plan.sequences, plan.sequence_length
        watch = FiniteWatch(self.index, stage.name, *size, device)
        if plan.streams > 1:
            # Linears that share their input share C - H; o and down have a G each.
            # The last stream holds the source's weights.
            if len(stage.linears) == 1:
                alone = self.streams[-1].block.weight(first)
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
                self._weigh(unit, read[0], made[0])
            sequence = unit * plan.unit_sequences
            for stream in made:
                watch.see(stream.value_BTI, sequence)
            u_TI = flat(made[0].value_BTI)
            if drift is None:
                return u_TI, None
            if not plan.residual_correction:
                made = [StageInput(stream.value_BTI) for stream in made]
            return u_TI, drift_error(made[0], made[1], weight(unit), alone)

        slots = [stream.slot(number) for stream in self.streams]
        for run in self.passes.over(slots, self.index, stage.name, one):
            # No names: they would keep a run in memory while the next one is made.
            hessian.add(
                [(u_TI, weight(unit)) for unit, (u_TI, _) in run], self.passes.pool
            )
            if drift is not None:
                drift.add(
                    [(error, u_TI) for _, (u_TI, error) in run if error is not None],
                    self.passes.pool,
                )
        watch.require()
        return hessian, drift

    def _stage_weight(self, linear: str) -> Callable[[int], Tensor]:
        """Give what weighs a unit's tokens: all alike, if the linear is left out."""
        if self.plan.weighs(linear):
            return self.token_weights.of_unit
        return lambda unit: torch.ones_like(self.token_weights.of_unit(unit))

    def _weigh(self, unit: int, x_BTD: Tensor, attention_in: StageInput) -> None:
        """Keep the importance of a unit's tokens, once per block."""
        block = self.streams[0].block
        x_BTD = x_BTD.to(attention_in.value_BTI)
        weight_BT = self.importance.weights(unit, block, x_BTD, attention_in.value_BTI)
        self.token_weights.put(unit, weight_BT)


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
    error_TO = _products(weighted_TI, weight_OI)
    if quantized.residual_BTD is not None and full.residual_BTD is not None:
        residuals = flat(full.residual_BTD), flat(quantized.residual_BTD)
        error_TO += stream_error(*residuals, weight_T)
    return error_TO


def _products(weighted_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Compute x W^T in fp32; of weights in another type or place, some rows at a time.

    Whole, they would be there twice. Of 16-bit weights a GPU makes products of x's two
    terms, in which fp32 would take it ten times as long.
    """
    if weight_OI.dtype == torch.float32 and weight_OI.device == weighted_TI.device:
        return weighted_TI @ weight_OI.T
    parts = weight_OI.split(OUTPUTS)
    if not weighted_TI.is_cuda or weight_OI.dtype == torch.float32:
        return torch.cat([weighted_TI @ part.to(weighted_TI).T for part in parts], 1)
    made_TO = weighted_TI.new_zeros(len(weighted_TI), len(weight_OI))
    high, low, unit = two_terms(weighted_TI, weight_OI.dtype)
    for made_TR, part_RI in zip(made_TO.split(OUTPUTS, 1), parts, strict=True):
        there_IR = part_RI.to(weighted_TI.device).T
        for term_TI in (high, low):
            add_product(made_TR, term_TI, there_IR, unit)
    return made_TO
