"""The seconds of each stage of a block, from counts of work and measured rates.

Where a stage computes and a disk reads or writes beside it, the longer of both counts.
"""

import functools
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.algorithm.rotation.hadamard import kronecker_factors
from rsq_stream.config.execution_plan import ExecutionPlan
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.families.base import Activation, Group, Linear, Stage
from rsq_stream.pipeline.job import Job
from rsq_stream.planning.machine_speed import MachineSpeed, measure_speed, solve_flops
from rsq_stream.storage.atomic import existing

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
        """Return those of the whole run."""
        return sum(self.stages.values())


def forecast(job: Job) -> Prediction | None:
    """Predict a run's seconds by what this machine does; None for a card not here."""
    options = job.options
    if options.on_gpu and not torch.cuda.is_available():
        return None
    folder = existing(options.work_dir.absolute())
    rates = _rates(job.plan, options.device, options.workers, folder)
    return predict(
        job.architecture, job.plan, job.execution, rates, on_gpu=options.on_gpu
    )


@functools.lru_cache(maxsize=4)
def _rates(
    plan: QuantizationPlan, device: str, workers: int, folder: Path
) -> MachineSpeed:
    return measure_speed(plan, torch.device(device), workers, folder)


def predict(
    architecture: Architecture,
    plan: QuantizationPlan,
    execution: ExecutionPlan,
    rates: MachineSpeed,
    *,
    on_gpu: bool,
) -> Prediction:
    """Predict the stages of all blocks; what lies outside them is read and written."""
    work = _Work(
        architecture=architecture,
        plan=plan,
        execution=execution,
        rates=rates,
        on_gpu=on_gpu,
    )
    stages = {"embedding and head": work.outside()}
    for block, count in architecture.kinds.items():
        for name, seconds in replace(work, index=block).block().items():
            stages[name] = stages.get(name, 0.0) + count * seconds
    return Prediction(stages)


@dataclass(frozen=True, kw_only=True)
class _Work:
    architecture: Architecture
    plan: QuantizationPlan
    execution: ExecutionPlan
    rates: MachineSpeed
    on_gpu: bool
    index: int = 0
    """The block that is counted."""

    def outside(self) -> float:
        """Read, rotate and write embedding and head, and write the first inputs."""
        shape = self.architecture
        entries = shape.vocabulary * shape.width * (1 if shape.tied else 2)
        seconds = self._rotated(entries, shape.width)
        size = self.execution.source_bytes / self._source_entries
        return seconds + entries * size / self.rates.read + self._slot_written()

    def block(self) -> dict[str, float]:
        """Return one block's stages, by the names of the memory plan."""
        found = {"read and rotate": self._reading()}
        if not self.plan.needs_calibration:
            entries = sum(map(self._entries, self._linears))
            return found | {"round": entries / self.rates.weights}
        for stage in self.architecture.stages(self.index):
            found[f"{stage.name}: pass"] = self._pass(stage)
            for group in stage.groups:
                factorising = f"{stage.name}: factorise"
                found[factorising] = found.get(factorising, 0.0) + self._factor(group)
                for linear in group.linears:
                    solving = f"{stage.name}: solve {linear.role}"
                    seconds = self._solving(group, linear)
                    found[solving] = found.get(solving, 0.0) + seconds
        found["outputs: pass"] = self._outputs()
        return found

    def _factor(self, group: Group) -> float:
        inputs = self._inputs(group)
        in_products = inputs**3 / 3 / self.rates.products
        return in_products + inputs**2 / self.rates.factored

    def _reading(self) -> float:
        shape, seconds = self.architecture, 0.0
        block = shape.block_entries(self.index)
        for linear in self._linears:
            seconds += self._rotated(self._entries(linear), shape.width)
        if (
            self.execution.prefetches_blocks
        ):  # the block before it takes longer to solve
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

    def _pass(self, stage: Stage) -> float:
        plan, tokens, group = self.plan, self._tokens, stage.groups[0]
        inputs = self._inputs(group)
        terms = _BF16_TERMS if self.on_gpu else 1
        flops = terms * float(inputs) ** 2  # half of H is made
        values = 0.0
        if plan.streams > 1:
            values += _TOUCHES * inputs
            if group.alone:
                outputs = self.architecture.size(group.alone.outputs)
                flops += 2.0 * (1 + terms) * outputs * inputs
            else:
                flops += 2.0 * terms * inputs**2
        seconds = tokens * (flops / self.rates.products + values / self.rates.values)
        seconds += plan.streams * self._forward(stage)
        if stage is self.architecture.stages(self.index)[0]:
            seconds += self._importance()
        written = self._slot_written() if stage.writes else 0.0
        return max(seconds, self._slot_read() + written)

    def _importance(self) -> float:
        """Return the seconds that the needs of the importance strategy take."""
        needs, seconds = STRATEGIES[self.plan.importance].needs, 0.0
        if "attention" in needs:
            seconds += self._scored(self.rates.sums) + self._projected()
        if "block_output" in needs:
            flops = 2.0 * self._tokens * sum(map(self._entries, self._linears))
            seconds += self._scored(self.rates.scores) + flops / self.rates.products
        return seconds

    def _solving(self, group: Group, linear: Linear) -> float:
        outputs, inputs = self.architecture.shape(linear)
        flops = solve_flops(self.plan, outputs, inputs)
        if self.plan.streams > 1:
            # Two triangular solves; and W (C - H), where that is shared.
            flops += (2 if group.alone else 4) * float(outputs) * inputs**2
        return flops / self.rates.products + outputs * inputs / self.rates.weights

    def _outputs(self) -> float:
        shape = self.architecture
        down = 2.0 * self._tokens * shape.width * shape.mlp_width
        again = 1 - self.execution.cached_mlp_units / max(1, self.plan.units)
        last = self.architecture.stages(self.index)[-1]
        one = again * self._forward(last) + down / self.rates.products
        disk = self._slot_read() + self._slot_written()
        return max(self.plan.streams * one, disk)

    def _forward(self, stage: Stage) -> float:
        """One stream through the part of the block that a stage needs."""
        shape, tokens = self.architecture, self._tokens
        heads, values = shape.heads * shape.head_width, 2 * _TOUCHES * shape.width
        if stage.input is Activation.ATTENTION_INPUT:
            return tokens * values / self.rates.values
        if stage.input is Activation.MLP_INNER:
            flops = 4.0 * shape.width * shape.mlp_width
            values += _TOUCHES * shape.mlp_width
            each = flops / self.rates.products + values / self.rates.values
            return tokens * each
        again = 1.0
        if stage.writes and not self.on_gpu:
            again = 1 - self._resident  # the others have their attention's output
        seconds = again * (self._projected() + self._scored(self.rates.scores))
        if stage.writes:
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
        outside = sum(map(prod, shape.outer_shapes().values()))
        return outside + sum(map(shape.block_entries, range(shape.blocks)))

    @property
    def _linears(self) -> tuple[Linear, ...]:
        return tuple(self.architecture.linears(self.index).values())

    def _entries(self, linear: Linear) -> int:
        return prod(self.architecture.shape(linear))

    def _inputs(self, group: Group) -> int:
        return self.architecture.size(group.linears[0].inputs)
