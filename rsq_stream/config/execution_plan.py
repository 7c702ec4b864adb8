"""How a run goes on this machine: place, memory and speed; decides no byte."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageMemory:
    """The memory that one stage of a block takes at its peak."""

    name: str
    device_bytes: int
    """On the GPU; 0 where the host computes."""
    host_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionPlan:
    """How a plan runs within the budgets of this machine; decides no byte."""

    in_flight: int
    """Units between two barriers of a pass."""
    resident_units: int
    """Units of each slot that stay in host memory; the others go to disk."""
    cached_mlp_units: int
    """Units whose MLP is not computed again for the block's outputs."""
    mlp_bytes: int
    """Host memory that these take, from the MLP's last stage to the outputs."""
    slots: int
    """Activation slots alive at once."""
    slot_bytes: int
    working_bytes: int
    """Host memory beside the resident units: block, Hessian, units in flight."""
    scratch_bytes: int
    """High-water mark of the work folder."""
    written_bytes: int
    """Everything written to disk over the run, output included."""
    source_bytes: int
    source_disk_bytes: int
    """With ``evict_source``, the most that lies in the hub's cache at a time; else all
    of the source."""
    output_bytes: int
    """The output's shards, exactly."""
    small_bytes: int
    """About what the output's other files and the journal take."""
    bits_per_weight: float
    """Bits of the whole output per weight of the model."""
    fallbacks: tuple[str, ...]
    """Linears whose inputs the group size does not divide."""
    solves_largest_first: bool
    """The largest linear is solved once with random data, before the first block."""
    used_bytes: int
    """Host memory that this process had taken when it planned."""
    offloads_weights: bool
    """A block's linears lie in host memory, and the GPU fetches them for each use."""
    keeps_solver_weights_on_gpu: bool
    """The solver's weights stay on the GPU, not in host memory."""
    prefetches_blocks: bool
    """The next block is read into host memory while this one computes."""
    device_bytes: int
    """GPU memory at the peak, what lies outside the allocator included."""
    stages: tuple[StageMemory, ...]
    """What each stage of a block takes, in their order."""

    @property
    def tightest(self) -> StageMemory:
        """The stage that decides the budget: on the GPU, where there is one."""
        return max(self.stages, key=lambda made: (made.device_bytes, made.host_bytes))
