"""The seconds of each stage of a block, from counts of work and measured rates.

Where a stage computes and a disk reads or writes beside it, the longer of both counts.
"""

from dataclasses import dataclass
from math import prod

from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.algorithm.rotation.hadamard import kronecker_factors
from rsq_stream.config.execution_plan import ExecutionPlan
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.families.base import LINEARS, STAGES, WRITES_H, Stage
from rsq_stream.model.tensor_names import role
from rsq_stream.planning.machine_speed import Rates, solve_flops

_BF16_TERMS = 2
"""A GPU multiplies w x as two bf16 terms (``algorithm/gptq/hessian.py``)."""
_TOUCHES = 4
"""Elementwise work of about silu(x) y, for each value that a pass makes."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of a run."""

    stages: dict[str, float]
    """By stage, over all blocks."""

    @property
    def seconds(self) -> float:
        """Give those of the whole run."""
        return sum(self.stages.values())


def predict(
    architecture: Architecture,
    plan: QuantizationPlan,
    execution: ExecutionPlan,
    rates: Rates,
    *,
    on_gpu: bool,
) -> Prediction:
    """Predict the stages of all blocks; what lies outside them is read and written."""
    work = _Work(architecture, plan, execution, rates, on_gpu)
    blocks = architecture.blocks
    return Prediction(
        {
            "embedding and head": work.outside(),
            **{name: blocks * seconds for name, seconds in work.block().items()},
        }
    )


@dataclass(frozen=True)
class _Work:
    architecture: Architecture
    plan: QuantizationPlan
    execution: ExecutionPlan
    rates: Rates
    on_gpu: bool

    def outside(self) -> float:
        """Read, rotate and write embedding and head, and write the first inputs."""
        shape = self.architecture
        entries = shape.vocabulary * shape.width * (1 if shape.tied else 2)
        seconds = self._rotated(entries, shape.width)
        size = self.execution.source_bytes / self._source_entries
        return seconds + entries * size / self.rates.read + self._slot_written()

    def block(self) -> dict[str, float]:
        """Give one block's stages, by the names of the memory plan."""
        found = {"read and rotate": self._reading()}
        if not self.plan.needs_calibration:
            entries = sum(map(self._entries, LINEARS))
            return found | {"round": entries / self.rates.weights}
        for number, stage in enumerate(STAGES):
            found[f"{stage.name}: pass"] = self._pass(number, stage)
            inputs = self._inputs(stage)
            in_products = inputs**3 / 3 / self.rates.products
            seconds = in_products + inputs**2 / self.rates.factored
            found[f"{stage.name}: factorise"] = seconds
            for linear in stage.linears:
                name = f"{stage.name}: solve {role(linear)}"
                found[name] = self._solving(stage, linear)
        found["outputs: pass"] = self._outputs()
        return found

    def _reading(self) -> float:
        shape, seconds = self.architecture, 0.0
        block = sum(map(prod, shape.block_shapes().values()))
        for linear in LINEARS:
            seconds += self._rotated(self._entries(linear), shape.width)
        if self.execution.reads_ahead:  # the block before it takes longer to solve
            return seconds
        size = self.execution.source_bytes / self._source_entries
        return seconds + block * size / self.rates.read

    def _rotated(self, entries: int, width: int) -> float:
        """Count a Hadamard product by its Kronecker factors, and copies around it."""
        seconds = entries * _TOUCHES / self.rates.values
        name = self.plan.residual_rotation
        if name == "none":
            return seconds
        order = int(name.rpartition("-")[2])
        sizes = [order]
        if "hadamard" in name:
            sizes = [len(factor) for factor in kronecker_factors(order)]
        # A GPU's own kernel does it in one pass over memory.
        flops = 0 if self.on_gpu else 2.0 * entries * sum(sizes)
        return seconds + flops / self.rates.products

    def _pass(self, number: int, stage: Stage) -> float:
        plan, tokens, inputs = self.plan, self._tokens, self._inputs(stage)
        terms = _BF16_TERMS if self.on_gpu else 1
        flops = terms * float(inputs) ** 2  # half of H is made
        values = 0.0
        if plan.streams > 1:
            values += _TOUCHES * inputs
            if len(stage.linears) == 1:
                outputs = self.architecture.linear_shape(stage.linears[0])[0]
                flops += 2.0 * (1 + terms) * outputs * inputs
            else:
                flops += 2.0 * terms * inputs**2
        seconds = tokens * (flops / self.rates.products + values / self.rates.values)
        seconds += plan.streams * self._forward(number)
        if number == 0:
            seconds += self._importance()
        written = self._slot_written() if number == WRITES_H else 0.0
        return max(seconds, self._slot_read() + written)

    def _importance(self) -> float:
        """Return the seconds that the needs of the importance strategy take."""
        needs, seconds = STRATEGIES[self.plan.importance].needs, 0.0
        if "attention" in needs:
            seconds += self._scored(self.rates.sums) + self._projected()
        if "block_output" in needs:
            flops = 2.0 * self._tokens * sum(map(self._entries, LINEARS))
            seconds += self._scored(self.rates.scores) + flops / self.rates.products
        return seconds

    def _solving(self, stage: Stage, linear: str) -> float:
        outputs, inputs = self.architecture.linear_shape(linear)
        flops = solve_flops(self.plan, outputs, inputs)
        if self.plan.streams > 1:
            # Two triangular solves; and W (C - H), where that is shared.
            flops += (2 if len(stage.linears) == 1 else 4) * float(outputs) * inputs**2
        return flops / self.rates.products + outputs * inputs / self.rates.weights

    def _outputs(self) -> float:
        shape = self.architecture
        down = 2.0 * self._tokens * shape.width * shape.mlp_width
        again = 1 - self.execution.mlp_units / max(1, self.plan.units)
        one = again * self._forward(len(STAGES) - 1) + down / self.rates.products
        disk = self._slot_read() + self._slot_written()
        return max(self.plan.streams * one, disk)

    def _forward(self, number: int) -> float:
        """One stream through the part of the block that a stage needs."""
        shape, tokens = self.architecture, self._tokens
        heads, values = shape.heads * shape.head_width, 2 * _TOUCHES * shape.width
        if number == 0:
            return tokens * values / self.rates.values
        if number == len(STAGES) - 1:
            flops = 4.0 * shape.width * shape.mlp_width
            values += _TOUCHES * shape.mlp_width
            each = flops / self.rates.products + values / self.rates.values
            return tokens * each
        again = 1.0
        if number == WRITES_H and not self.on_gpu:
            again = 1 - self._resident  # the others have their attention's output
        seconds = again * (self._projected() + self._scored(self.rates.scores))
        if number == WRITES_H:
            flops = 2.0 * tokens * shape.width * heads
            seconds += flops / self.rates.products
        return seconds + tokens * values / self.rates.values

    def _projected(self) -> float:
        """q, k and v of all tokens, and RoPE."""
        shape = self.architecture
        heads = (shape.heads + 2 * shape.kv_heads) * shape.head_width
        each = 2.0 * shape.width * heads / self.rates.products
        return self._tokens * (each + _TOUCHES * heads / self.rates.values)

    def _scored(self, rate: float) -> float:
        """All heads of all sequences, at a rate measured with heads 128 wide."""
        shape, length = self.architecture, self.plan.sequence_length
        scores = shape.heads * self._tokens * length / 2
        return scores * max(0.25, shape.head_width / 128) / rate

    def _slot_read(self) -> float:
        left = 1 - self._resident
        return left * self.plan.streams * self.execution.slot_bytes / self.rates.read

    def _slot_written(self) -> float:
        if not self.plan.needs_calibration:
            return 0.0
        return self.plan.streams * self.execution.slot_bytes / self.rates.written

    @property
    def _resident(self) -> float:
        return self.execution.resident_units / max(1, self.plan.units)

    @property
    def _tokens(self) -> int:
        return self.plan.sequences * self.plan.sequence_length

    @property
    def _source_entries(self) -> int:
        shape = self.architecture
        block = sum(map(prod, shape.block_shapes().values()))
        outside = sum(map(prod, shape.outer_shapes().values()))
        return outside + shape.blocks * block

    def _entries(self, linear: str) -> int:
        return prod(self.architecture.linear_shape(linear))

    def _inputs(self, stage: Stage) -> int:
        return self.architecture.linear_shape(stage.linears[0])[1]
