"""The memory of each stage of a block whose bits are to be chosen (``--bpw``).

Its passes and factors are those of a run. In place of solving, each linear is rounded
at every number of bits; then a last pass is made for each linear as it was rounded.
"""

from dataclasses import dataclass

from rsq_stream.config.execution_plan import StageMemory
from rsq_stream.model.families.base import LINEARS, STAGES, Stage
from rsq_stream.model.tensor_names import role
from rsq_stream.pipeline.bit_allocation.block_sensitivity import PROBE_TOKENS
from rsq_stream.planning.memory.stages import FP32, ROUNDING_BYTES, MemoryPlan


@dataclass(frozen=True)
class MeasuringMemory(MemoryPlan):
    """A measuring plan on a device, as a ``MemoryPlan``."""

    def stages(self) -> tuple[StageMemory, ...]:
        """Give all stages, in their order."""
        found = [self._outside(), self._reading()]
        rounded: list[str] = []
        for number, stage in enumerate(STAGES):
            found.append(self._with_probes(self._pass(number, stage, []), rounded))
            found.append(self._with_probes(self._factorising(stage, []), rounded))
            for linear in stage.linears:
                found.append(self._measuring(stage, linear, rounded))
                rounded.append(linear)
        found.append(self._probing(rounded))
        found.append(self._with_probes(self._outputs([]), rounded))
        return tuple(found)

    def _with_probes(self, made: StageMemory, rounded: list[str]) -> StageMemory:
        """Add what the host keeps of linears that are rounded already."""
        probes = self._compute_size * sum(map(self._entries, rounded))
        return StageMemory(made.name, made.device_bytes, made.host_bytes + probes)

    def _measuring(self, stage: Stage, linear: str, rounded: list[str]) -> StageMemory:
        """Count the factor, and a linear in fp32 with what rounding it takes."""
        device = self._weights([], used=False) + self._statistics(stage)
        device += (FP32 + ROUNDING_BYTES) * self._entries(linear)
        device += self._aside(self._inputs(stage))
        host = self._solver_weights(rounded)
        made = self._made(f"{stage.name}: measure {role(linear)}", device, host)
        return self._with_probes(made, rounded)

    def _probing(self, rounded: list[str]) -> StageMemory:
        """Count inputs and outputs of some units, and a rounded linear in use."""
        tokens = self._unit_tokens
        units = min(self.plan.units, -(-PROBE_TOKENS // tokens))
        held = self._compute_size * tokens * self.architecture.width
        # Outputs before and after in fp32, and squares of them.
        apart = 4 * FP32 * tokens * self.architecture.width
        through = max(map(self._forward, range(len(STAGES)))) + apart
        concurrent = min(self.workers, units)
        largest = max(map(self._entries, LINEARS))
        device = self._weights([]) + self._compute_size * largest
        device += units * 2 * held + concurrent * through
        host = self._solver_weights(rounded) + self._host_units()
        return self._with_probes(self._made("probes: pass", device, host), rounded)
