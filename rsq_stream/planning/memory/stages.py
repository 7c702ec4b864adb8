"""The memory of each stage of a block, from sizes alone: nothing is allocated here.

A block is read and rotated; then each of its stages makes a pass over the units,
factorises its Hessian and solves its linears one by one; a last pass writes the
block's outputs. On a GPU the device holds what is computed with, and the host the
solver's fp32 weights and the units on their way; elsewhere the host holds all of it.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod

import torch

from rsq_stream.algorithm.gptq.ldl import wide_blocks
from rsq_stream.config.execution_plan import StageMemory
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.families.base import Group, Linear, Stage
from rsq_stream.planning.memory.embedding import (
    largest_linear,
    outer_bytes,
    rotation_bytes,
)
from rsq_stream.planning.memory.forward import forward_bytes, unit_bytes
from rsq_stream.planning.memory.solver import packed_bytes, solving_bytes
from rsq_stream.runtime.transfers import pinned_total, staged_bytes

FP32 = 4
_OUTSIDE, _READING = "embedding and head", "read and rotate"
"""The stages in which no next block is read."""
TOKEN_BYTES = 4
"""A token of the calibration set (``calibration/windows.py``)."""
ROUNDING_BYTES = 2 * FP32 + 3 * 8
"""Bytes of a weight while it is rounded alone, its error's energy in fp64."""


@dataclass(frozen=True, kw_only=True)
class StageMemoryModel:
    """A plan on a device, with so many units in flight: what each stage takes."""

    architecture: Architecture
    plan: QuantizationPlan
    source_type: torch.dtype
    in_flight: int
    workers: int
    on_gpu: bool
    offloads_weights: bool = False
    """On a GPU, a block's linears lie in host memory, and are fetched for each use."""
    keeps_solver_weights_on_gpu: bool = False
    """On a GPU, the solver's fp32 weights stay there, not in host memory."""
    prefetches_blocks: bool = False
    """On a GPU, the next block is read into host memory while this one computes."""
    block: int = 0
    """The block that is counted; ``stages`` counts one of each kind."""

    def stages(self) -> tuple[StageMemory, ...]:
        """Return the most that each stage takes in any block, in their order."""
        most: dict[str, StageMemory] = {}
        for block in self.architecture.kinds:
            for stage in replace(self, block=block).block_stages():
                before = most.get(stage.name, stage)
                most[stage.name] = StageMemory(
                    stage.name,
                    max(before.device_bytes, stage.device_bytes),
                    max(before.host_bytes, stage.host_bytes),
                )
        return tuple(most.values())

    def block_stages(self) -> list[StageMemory]:
        """Return what each stage of one block takes, in their order."""
        counted = [self._outside(), self._reading()]
        if not self.plan.needs_calibration:
            return [*counted, self._rounding()]
        solved: list[Linear] = []
        for stage in self.architecture.stages(self.block):
            counted.append(self._pass(stage, solved))
            for group in stage.groups:
                counted.append(self._factorising(stage, group, solved))
                for linear in group.linears:
                    counted.append(self._solving(stage, group, linear, solved))
                    solved.append(linear)
        return [*counted, self._outputs(solved)]

    def _made(self, name: str, device: int, host: int) -> StageMemory:
        """Put a stage together; without a GPU the host has the device's part too."""
        device, host = device + self._token_weights, host + self._windows
        if self.on_gpu:
            if self.plan.needs_calibration:  # they are there all the time
                host += pinned_total(*self._flight)
            if self.prefetches_blocks and name not in (_OUTSIDE, _READING):
                host += self._stored
            return StageMemory(name, device, host)
        return StageMemory(name, 0, device + host)

    def _outside(self) -> StageMemory:
        """Count a chunk of embedding or head; and the windows, as written to a file."""
        chunks, written = outer_bytes(self.architecture, self.plan), 2 * self._windows
        return self._made(_OUTSIDE, chunks * self.on_gpu, max(chunks, written))

    def _reading(self) -> StageMemory:
        """Count a block as stored, in fp32, and what a linear's rotation takes."""
        kind, whole = self.source_type.itemsize, FP32 * self._block_entries
        sizes = self.architecture, self.plan, kind
        rotation = rotation_bytes(*sizes, on_gpu=self.on_gpu)
        return self._made(_READING, whole + rotation, self._stored)

    def _rounding(self) -> StageMemory:
        """Count for rounding alone the block in fp32, and what a linear takes."""
        largest = largest_linear(self.architecture)
        block = FP32 * self._block_entries
        if self.offloads_weights:
            return self._made("round", (FP32 + ROUNDING_BYTES) * largest, block)
        return self._made("round", block + ROUNDING_BYTES * largest, 0)

    def _pass(self, stage: Stage, solved: list[Linear]) -> StageMemory:
        """Count the stage's statistics, and units on their way through the block."""
        plan, tokens, group = self.plan, self.plan.unit_tokens, stage.groups[0]
        inputs = self._inputs(group)
        held = self._compute_size * tokens * inputs
        errors = FP32 * tokens * self._error_rows(group) if plan.streams > 1 else 0
        through = unit_bytes(
            self.architecture, plan, stage, self._compute_size, on_gpu=self.on_gpu
        )
        panel = min(plan.hessian_panel, inputs)
        product = FP32 * panel * tokens
        if self.on_gpu:  # the two terms of the errors too, all panels at once
            product = max(product, errors)
        concurrent = min(self.workers, self.in_flight)
        # Units that wait for the others, and those at work; then products of all.
        waiting = (self.in_flight - concurrent) * (held + errors)
        device = self._weights(solved) + sum(map(self._statistics, stage.groups))
        device += max(
            waiting + concurrent * through,
            self.in_flight * (held + errors) + self.workers * product,
        )
        device += self._staged(plan.streams if stage.writes else 0)
        host = self._solver_weights(solved) + self._host_units()
        return self._made(f"{stage.name}: pass", device, host)

    def _factorising(
        self, stage: Stage, group: Group, solved: list[Linear]
    ) -> StageMemory:
        """Count H, which becomes its factor in place, and its diagonal blocks."""
        inputs = self._inputs(group)
        device = self._weights(solved, used=False) + self._statistics(group)
        device += self._aside(inputs) + 2 * FP32 * self.plan.tile_columns * inputs
        if self.plan.act_order:  # its other half, and columns in another order
            device += 3 * FP32 * inputs * inputs
        host = self._solver_weights(solved)
        return self._made(f"{stage.name}: factorise", device, host)

    def _solving(
        self, stage: Stage, group: Group, linear: Linear, solved: list[Linear]
    ) -> StageMemory:
        """Count the factor, and what the linear takes (``memory/solver.py``)."""
        shape = self.architecture.shape(linear)
        taken = solving_bytes(
            self.plan,
            shape,
            self._compute_size,
            self.workers,
            kept=self.keeps_solver_weights_on_gpu,
        )
        device = self._weights(solved, used=False) + self._statistics(group) + taken
        device += self._aside(shape[1])
        host = self._solver_weights(solved)
        if self.on_gpu:  # codes on their way to the output, of the linear before too
            packed = max(
                packed_bytes(self.plan, self.architecture, self.block, member)
                for member in group.linears
            )
            host += packed
            device += 0 if group.alone else packed
        return self._made(f"{stage.name}: solve {linear.role}", device, host)

    def _aside(self, inputs: int) -> int:
        """Count H's blocks on the diagonal, which the factor keeps beside it."""
        _, wide = wide_blocks(inputs, self.plan.tile_columns)[0]
        return FP32 * wide * inputs

    def _outputs(self, solved: list[Linear]) -> StageMemory:
        """Count the pass that writes the next block's inputs."""
        tokens = self.plan.unit_tokens
        held = self._compute_size * tokens * self.architecture.width
        concurrent = min(self.workers, self.in_flight)
        device = self._weights(solved) + (self.in_flight - concurrent) * held
        device += concurrent * self._forward(None)
        device += self._staged(1)
        return self._made("outputs: pass", device, self._host_units())

    def _forward(self, stage: Stage | None) -> int:
        """Count what one unit takes on its way through one stream of the block."""
        sizes = self.architecture, self.plan, stage, self._compute_size
        return forward_bytes(*sizes, on_gpu=self.on_gpu)

    def _host_units(self) -> int:
        """Count a unit read ahead and one waiting to be written, for each in flight.

        With a GPU they are in pinned buffers.
        """
        return 0 if self.on_gpu else 2 * prod(self._flight)

    def _staged(self, written: int) -> int:
        """Count units on a GPU, where so many streams are written."""
        return staged_bytes(*self._flight, written) if self.on_gpu else 0

    def _weights(self, solved: list[Linear], *, used: bool = True) -> int:
        """Count the block as the passes see it: quantized, and full beside it.

        Where they are fetched, one linear at a time, and none unless they are used.
        """
        size = self._compute_size
        if self.offloads_weights:
            return size * max(map(self._entries, self._linears)) * used
        twice = solved if self.plan.streams > 1 else []
        kept = self._unsolved(solved) if self.keeps_solver_weights_on_gpu else 0
        return size * (self._block_entries + sum(map(self._entries, twice))) + kept

    def _solver_weights(self, solved: list[Linear]) -> int:
        """Count what the host keeps of a block: weights to solve; streamed ones.

        Without a GPU they are those that the passes see.
        """
        if not self.on_gpu:
            return 0
        host = 0 if self.keeps_solver_weights_on_gpu else self._unsolved(solved)
        if self.offloads_weights:
            twice = solved if self.plan.streams > 1 else []
            entries = sum(map(self._entries, (*self._linears, *twice)))
            host += self._compute_size * entries
        return host

    def _unsolved(self, solved: list[Linear]) -> int:
        """Count the solver's weights of the linears that are left."""
        left = [linear for linear in self._linears if linear not in solved]
        return FP32 * sum(map(self._entries, left))

    @property
    def _windows(self) -> int:
        """The calibration set's tokens, which are kept to the end."""
        tokens = self.plan.samples * self.plan.sequence_length
        return TOKEN_BYTES * tokens if self.plan.needs_calibration else 0

    @property
    def _token_weights(self) -> int:
        """The importance of each token, those of rolled copies too."""
        plan = self.plan
        if not plan.needs_calibration:
            return 0
        size = FP32 if plan.importance_exact else 2
        return size * plan.sequences * plan.sequence_length

    def _statistics(self, group: Group) -> int:
        """Count H, and with two streams the cross term."""
        inputs = self._inputs(group)
        rows = inputs
        if self.plan.streams > 1:
            rows += self._error_rows(group)
        return FP32 * rows * inputs

    def _error_rows(self, group: Group) -> int:
        """Return the rows of the cross term: G's of a linear alone, else of C - H."""
        alone = group.alone
        return self.architecture.size(alone.outputs) if alone else self._inputs(group)

    def _inputs(self, group: Group) -> int:
        return self.architecture.size(group.linears[0].inputs)

    def _entries(self, linear: Linear) -> int:
        return prod(self.architecture.shape(linear))

    @property
    def _linears(self) -> Collection[Linear]:
        return self.architecture.linears(self.block).values()

    @property
    def _block_entries(self) -> int:
        return self.architecture.block_entries(self.block)

    @property
    def _stored(self) -> int:
        return self.source_type.itemsize * self._block_entries

    @property
    def _compute_size(self) -> int:
        return _itemsize(self.plan.compute_type)

    @property
    def _flight(self) -> tuple[int, int, int]:
        """Bytes of a unit, units in flight, streams."""
        size = _itemsize(self.plan.cache_type)
        unit = size * self.plan.unit_tokens * self.architecture.width
        return unit, self.in_flight, self.plan.streams


def _itemsize(name: str) -> int:
    kind: torch.dtype = getattr(torch, name)
    return kind.itemsize
