"""What a block's output loses for each linear at each number of bits.

The loss that GPTQ will leave is read off the factor without a sweep: with H + lambda I
= U D U^T it is sum over columns k of d_k e_k^2 (``algorithm/gptq/solver.py``), e_k the
rounding errors of column k's targets, which those of the weights stand for.

What such a loss does to the model is measured once per linear: with its weights rounded
to ``PROBE_BITS``, how far the block's output moves, as a share of each token's energy.
The cost of other bits follows in proportion to the losses.
"""

from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import Factor, factorise
from rsq_stream.algorithm.gptq.loss import weighted_losses
from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.grids._planned import make_grid
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import NumericalError
from rsq_stream.model.families.base import Group, Stage
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.pipeline.activations.calibration_pass import CalibrationPasses
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.pipeline.bit_allocation.costs import (
    BITS,
    PROBE_BITS,
    PROBE_TOKENS,
    Costs,
)
from rsq_stream.pipeline.run import Run
from rsq_stream.pipeline.stage_statistics import StageStatistics
from rsq_stream.pipeline.token_importance import TokenImportance


@dataclass(kw_only=True)
class BlockSensitivity:
    """One block in full precision, about to be measured."""

    run: Run
    index: int
    stream: Stream
    weights: dict[str, Tensor]
    """fp32 weights by linear, in host memory; each is dropped when it is measured."""
    importance: TokenImportance
    _losses: dict[str, dict[int, float]] = field(default_factory=dict)
    _probes: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    """Rounded weights by linear, in host memory, and their loss."""

    @property
    def _plan(self) -> QuantizationPlan:
        return self.run.job.plan

    @property
    def _passes(self) -> CalibrationPasses:
        return self.run.passes

    @cached_property
    def _types(self) -> dict[str, torch.dtype]:
        """Stored type of each linear."""
        return self.run.source.linear_types(self.index)

    def run_all(self) -> Costs:
        """Measure all linears; the block's outputs are written as well."""
        statistics = StageStatistics(
            run=self.run,
            index=self.index,
            streams=[self.stream],
            importance=self.importance,
        )
        for stage in self.run.job.architecture.stages(self.index):
            gathered = statistics.gather(stage)
            if stage.writes:
                self.stream.slots.h.flush(durable=False)
            for group in stage.groups:
                self._measure_group(stage, group, gathered[group].hessian)
        shares = self._shares()
        advance = partial(self.stream.advance, self._passes, self.index)
        self._passes.retry_with_fewer(advance, f"block {self.index}, outputs")
        return {
            linear: {
                bits: shares[linear] * loss / self._probes[linear][1]
                if self._probes[linear][1] > 0
                else 0.0
                for bits, loss in losses.items()
            }
            for linear, losses in self._losses.items()
        }

    def _measure_group(self, stage: Stage, group: Group, hessian: Hessian) -> None:
        self._passes.check()
        pool, columns = self._passes.pool, self._plan.tile_columns
        try:
            damping = self._plan.damping_for(hessian.matrix_II.shape[0])
            factor = factorise(hessian, damping, columns, pool)
        except NumericalError as error:
            where = f"block {self.index}, {stage.name}"
            raise NumericalError(f"{where}: {error}") from error
        for linear in group.linears:
            self._measure(linear.name, factor)

    def _measure(self, linear: str, factor: Factor) -> None:
        """Find a linear's losses at all bits, and keep it as the probe has it."""
        block = self.stream.block
        weight_OI = self.weights.pop(linear).to(block.device)
        self._losses[linear] = {}
        for bits in BITS:
            self._passes.check()
            scheme = self._scheme(linear, bits, weight_OI.shape[1])
            grid = make_grid(self._plan, bits, self._types[linear])
            rows = self._plan.tile_rows_of(weight_OI.shape[1])
            pool = self._passes.pool
            made = round_to_nearest(
                weight_OI, grid, scheme.group_size, tile_rows=rows, pool=pool
            )
            decoded_OI = grid.decode(made.code_OI, made.scale_OG, made.zero_OG)
            error_OI = weight_OI - decoded_OI
            error_I = error_OI.square().sum(0, dtype=torch.float64)
            loss = (error_I * factor.scale_I.double()).sum()
            self._losses[linear][bits] = float(loss)
            if bits == PROBE_BITS:
                probe_loss = float(weighted_losses([error_OI], factor))
                rounded_OI = decoded_OI.to("cpu", block.weight(linear).dtype)
                self._probes[linear] = rounded_OI, probe_loss

    def _scheme(self, linear: str, bits: int, inputs: int) -> Scheme:
        scheme = self._plan.scheme(block_prefix(self.index) + linear, inputs)
        assert scheme is not None
        return Scheme(bits, scheme.group_size, scheme.symmetric)

    def _shares(self) -> dict[str, float]:
        """Return by how much of its energy the output moves for each rounded linear."""
        block, pool = self.stream.block, self._passes.pool
        tokens = self._plan.unit_tokens
        units = min(self._plan.units, -(-PROBE_TOKENS // tokens))
        compute = getattr(torch, self._plan.compute_type)
        inputs = [
            x_BTD.to(block.device, compute)
            for x_BTD in self.stream.slots.x.read(range(units))
        ]
        outputs = pool.map(block.forward, inputs)

        def moved(unit: int) -> Tensor:
            before_BTD = outputs[unit].float()
            change_BTD = block.forward(inputs[unit]).float() - before_BTD
            energy_BT = before_BTD.square().sum(-1, dtype=torch.float64)
            moved_BT = change_BTD.square().sum(-1, dtype=torch.float64)
            return (moved_BT / energy_BT.clamp(min=1e-30)).sum()

        shares, count = {}, sum(x_BTD.shape[0] * x_BTD.shape[1] for x_BTD in inputs)
        for linear, (rounded_OI, _) in self._probes.items():
            self._passes.check()
            whole_OI = block.weight(linear)
            block.replace_weight(linear, rounded_OI)
            shares[linear] = float(torch.stack(pool.map(moved, range(units))).sum())
            shares[linear] /= count
            block.replace_weight(linear, whole_OI)
        return shares
