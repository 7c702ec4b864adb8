"""A stream of activations on its way through a block, stage by stage.

The quantized stream is what the quantized model sees, and comes first; with error
propagation the full-precision one goes beside it, with the source's weights. Both
run the same functions, each on its own block and slots.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.error_propagation import StageInput
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.block import Block
from rsq_stream.model.families.base import Activation, Stage
from rsq_stream.pipeline.activations.calibration_pass import CalibrationPasses
from rsq_stream.pipeline.activations.finite_check import FiniteWatch
from rsq_stream.pipeline.activations.slots import Slots
from rsq_stream.runtime.tensor_arena import TensorArena
from rsq_stream.storage.activation_cache import Slot


@dataclass(kw_only=True)
class Stream:
    """One stream: a block whose weights may change between stages, and its slots."""

    block: Block
    slots: Slots
    plan: QuantizationPlan
    _attention: TensorArena = field(init=False)
    """Attention outputs of resident units, until h is computed from them."""
    _mlp: TensorArena = field(init=False)
    """u of some units, from its stage to the block's outputs."""

    def __post_init__(self) -> None:
        shape = self.slots.x.shape
        tokens = shape.unit_sequences * shape.tokens
        size = tokens * self.block.attention_width * shape.dtype.itemsize
        self._attention = TensorArena(self.slots.resident, size)
        compute: torch.dtype = getattr(torch, self.plan.compute_type)
        size = tokens * self.block.inner_width * compute.itemsize
        self._mlp = TensorArena(self.slots.cached_mlp_units, size)

    def slot(self, stage: Stage) -> Slot:
        """Return the slot that a stage's pass reads."""
        return self.slots.h if stage.reads == "h" else self.slots.x

    def stage_input(self, stage: Stage, unit: int, read_BTD: Tensor) -> StageInput:
        """Compute the input of a stage from what its slot holds of a unit."""
        compute = {
            Activation.ATTENTION_INPUT: self._attention_in,
            Activation.ATTENTION_OUTPUT: self._attention_out,
            Activation.MLP_INPUT: self._mlp_in,
            Activation.MLP_INNER: self._mlp_inner,
        }
        return compute[stage.input](unit, read_BTD)

    def _attention_in(self, unit: int, x_BTD: Tensor) -> StageInput:
        """Compute a = norm1(x)."""
        del unit
        return StageInput(self.block.attention_input(self._computed(x_BTD)))

    def _attention_out(self, unit: int, x_BTD: Tensor) -> StageInput:
        """Compute c by the present q, k, v."""
        c_BTI = self._attention_output(x_BTD)
        if unit < self.slots.resident:
            self._attention.put(unit, c_BTI)
        return StageInput(self._computed(c_BTI), x_BTD)

    def _attention_output(self, x_BTD: Tensor) -> Tensor:
        a_BTD = self.block.attention_input(self._computed(x_BTD))
        return self._stored(self.block.attention_output(a_BTD))

    def _mlp_in(self, unit: int, x_BTD: Tensor) -> StageInput:
        """Compute m by the present o; h is kept for the passes that follow."""
        x_BTD = self._computed(x_BTD)
        if unit in self._attention:
            c_BTI = self._attention.take(unit).to(x_BTD.device)
        else:
            c_BTI = self._attention_output(x_BTD)
        h_BTD = self._stored(self.block.after_attention(x_BTD, self._computed(c_BTI)))
        self.slots.h.write(unit, h_BTD, durable=True)
        return StageInput(self.block.mlp_input(self._computed(h_BTD)))

    def _mlp_inner(self, unit: int, h_BTD: Tensor) -> StageInput:
        """Compute u by the present gate and up."""
        m_BTD = self.block.mlp_input(self._computed(h_BTD))
        u_BTI = self.block.mlp_output(m_BTD)
        if unit < self.slots.cached_mlp_units:
            self._mlp.put(unit, u_BTI)
        return StageInput(u_BTI, h_BTD)

    def replay_h(self, passes: CalibrationPasses, index: int) -> None:
        """Write h once more, by the weights that the block holds."""
        self.slots.h.renew()
        self.each(passes, index, "h again", self._mlp_in)
        self.slots.h.flush(durable=True)

    def each(
        self,
        passes: CalibrationPasses,
        index: int,
        what: str,
        function: Callable[[int, Tensor], object],
    ) -> None:
        """Apply a function to the block's input, unit by unit, for its effect."""
        device = self.block.device

        def one(unit: int, x_BTD: Tensor) -> None:
            function(unit, x_BTD.to(device))

        for _ in passes.run([self.slots.x], index, what, one):
            pass

    def advance(self, passes: CalibrationPasses, index: int) -> None:
        """Write x', durably: the next block's input.

        Reuse u where its stage cached it, because only ``down_proj`` has changed since.
        """
        slots, device = self.slots, self.block.device
        slots.x_next.renew()

        def one(unit: int, h_BTD: Tensor) -> Tensor:
            h_BTD = h_BTD.to(device)
            kept, h_BTD = unit in self._mlp, self._computed(h_BTD)
            if kept:
                u_BTI = self._mlp.get(unit)
            else:
                u_BTI = self.block.mlp_output(self.block.mlp_input(h_BTD))
            x_BTD = self._stored(self.block.after_mlp(h_BTD, u_BTI))
            if kept:
                self._mlp.drop(unit)
            return x_BTD

        shape = slots.h.shape
        watch = FiniteWatch(
            index,
            "outputs",
            sequences=shape.sequences,
            tokens=shape.tokens,
            device=device,
        )
        for run in passes.run([slots.h], index, "outputs", one):
            for unit, x_BTD in run:
                watch.see(x_BTD, unit * shape.unit_sequences)
                slots.x_next.write(unit, x_BTD, durable=True)
        watch.require()
        slots.x_next.flush(durable=True)
        slots.h.clear()

    def _computed(self, x: Tensor) -> Tensor:
        """Bring stored activations into the type that is computed in."""
        return x.to(getattr(torch, self.plan.compute_type))

    def _stored(self, x: Tensor) -> Tensor:
        """Round to the cache type: what a resumed pass would read is what is used."""
        return x.to(getattr(torch, self.plan.cache_type))
