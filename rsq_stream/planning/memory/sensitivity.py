"""The memory of each stage of a block whose bits are to be chosen (``--bpw``).

Its passes and factors are those of a run. In place of solving, each linear is rounded
at every number of bits; then a last pass is made for each linear as it was rounded.
"""

from dataclasses import dataclass

from rsq_stream.config.execution_plan import StageMemory
from rsq_stream.model.families.base import Group, Linear, Stage
from rsq_stream.pipeline.bit_allocation.costs import PROBE_TOKENS
from rsq_stream.planning.memory.stages import FP32, ROUNDING_BYTES, StageMemoryModel


@dataclass(frozen=True)
class SensitivityMemoryModel(StageMemoryModel):
    """A measuring plan on a device, as a ``StageMemoryModel``."""

    def block_stages(self) -> list[StageMemory]:
        """Return what each stage of one block takes, in their order."""
        counted = [self._outside(), self._reading()]
        rounded: list[Linear] = []
        for stage in self.architecture.stages(self.block):
            counted.append(self._with_probes(self._pass(stage, []), rounded))
            for group in stage.groups:
                factorising = self._factorising(stage, group, [])
                counted.append(self._with_probes(factorising, rounded))
                for linear in group.linears:
                    counted.append(self._measuring(stage, group, linear, rounded))
                    rounded.append(linear)
        counted.append(self._probing(rounded))
        return [*counted, self._with_probes(self._outputs([]), rounded)]

    def _with_probes(self, made: StageMemory, rounded: list[Linear]) -> StageMemory:
        """Add what the host keeps of linears that are rounded already."""
        probes = self._compute_size * sum(map(self._entries, rounded))
        return StageMemory(made.name, made.device_bytes, made.host_bytes + probes)

    def _measuring(
        self, stage: Stage, group: Group, linear: Linear, rounded: list[Linear]
    ) -> StageMemory:
        """Count the factor, and a linear in fp32 with what rounding it takes."""
        device = self._weights([], used=False) + self._statistics(group)
        device += (FP32 + ROUNDING_BYTES) * self._entries(linear)
        device += self._aside(self._inputs(group))
        host = self._solver_weights(rounded)
        made = self._made(f"{stage.name}: measure {linear.role}", device, host)
        return self._with_probes(made, rounded)

    def _probing(self, rounded: list[Linear]) -> StageMemory:
        """Count inputs and outputs of some units, and a rounded linear in use."""
        tokens = self.plan.unit_tokens
        units = min(self.plan.units, -(-PROBE_TOKENS // tokens))
        held = self._compute_size * tokens * self.architecture.width
        # Outputs before and after in fp32, and squares of them.
        apart = 4 * FP32 * tokens * self.architecture.width
        through = max(map(self._forward, self.architecture.stages(self.block))) + apart
        concurrent = min(self.workers, units)
        largest = max(map(self._entries, self._linears))
        device = self._weights([]) + self._compute_size * largest
        device += units * 2 * held + concurrent * through
        host = self._solver_weights(rounded) + self._host_units()
        return self._with_probes(self._made("probes: pass", device, host), rounded)
