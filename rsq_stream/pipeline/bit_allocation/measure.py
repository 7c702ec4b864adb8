"""The pass before a run with ``--bpw``: what each linear costs at each number of bits.

One block at a time like the run itself, in full precision, into a work folder of its
own: killed, it goes on after the last finished block, and what was measured once serves
any target.
"""

import dataclasses
import threading
import time
from functools import partial
from pathlib import Path

import torch

from rsq_stream.calibration.windows import Windows
from rsq_stream.checkpoint.hub_shards import OUTSIDE, bytes_to_fetch, mover
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.checkpoint.source import Source
from rsq_stream.checkpoint.source_identity import SourceIdentity
from rsq_stream.config.activations import NOTHING
from rsq_stream.config.execution_plan import ExecutionPlan
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.run_options import RunOptions
from rsq_stream.errors import DamagedError, Interrupted, PlanMismatchError, ScratchError
from rsq_stream.events import BlockFinished, Listener, Notice, RunStarted, ignore
from rsq_stream.model.architecture import Architecture, read_architecture
from rsq_stream.model.block import Block
from rsq_stream.model.online_rotation import planned_rotations
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.model.transformers_layers import Rope, layer_config
from rsq_stream.output.folder_checks import require_apart
from rsq_stream.pipeline import disk_space
from rsq_stream.pipeline.activations.calibration_pass import Passes, stopper
from rsq_stream.pipeline.activations.slots import RunSlots, embed
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.pipeline.bit_allocation.block_sensitivity import (
    PROBE_BITS,
    BlockMeter,
    Costs,
)
from rsq_stream.pipeline.block_setup import placed
from rsq_stream.pipeline.token_importance import make_importance
from rsq_stream.runtime.worker_pool import single_threaded_products
from rsq_stream.storage.journal import Journal
from rsq_stream.storage.work_folder import MEASURED, RunFolder


def measuring_plan(plan: QuantizationPlan) -> QuantizationPlan:
    """Give what the measured costs depend on: all but the bits and the solver's extras.

    Every linear is measured, also those that have their bits already.
    """
    return dataclasses.replace(
        plan,
        bits=PROBE_BITS,
        overrides=(),
        propagate=0.0,
        propagate_overrides=(),
        sweeps=0,
        refit=False,
        act_order=False,
        **dataclasses.asdict(NOTHING),
    )


def measure(
    checkpoint: Checkpoint,
    plan: QuantizationPlan,
    execution: ExecutionPlan,
    options: RunOptions,
    windows: Windows,
    *,
    listener: Listener = ignore,
    stop: threading.Event | None = None,
) -> Costs:
    """Measure all linears of a model, by full name; at once where that was done before.

    ``plan`` is that of ``measuring_plan``, ``execution`` one that ``measures``.

    Raises
    ------
    Interrupted
        ``stop`` was set: finished blocks are kept.
    RsqError
        Whatever else went wrong, in one line.
    """
    stop = stop or threading.Event()
    require_apart(options.output, options.work_dir)
    place = options.work_dir / MEASURED
    # Nothing of the output is written here.
    needs = dataclasses.replace(execution, output_bytes=0, small_bytes=0)
    here = dataclasses.replace(options, work_dir=place)
    to_fetch = partial(bytes_to_fetch, checkpoint, options)
    with (
        disk_space.said_when_full(needs, here, to_fetch),
        RunFolder(place) as folder,
        single_threaded_products(options.workers, stopper(stop)) as pool,
    ):
        passes = Passes(pool, execution.in_flight, listener, stop)
        if options.restart:
            folder.clear()
        if missing := disk_space.shortage(needs, here, to_fetch()):
            raise ScratchError(missing)
        while True:
            try:
                journal = folder.open_journal(plan.canonical_json(), plan.sha256)
                run = _Run(
                    *(checkpoint, plan, execution, options),
                    *(journal, passes, place, windows),
                )
                try:
                    return run.costs()
                except Interrupted as error:
                    raise Interrupted(
                        "stopped while measuring what bits cost; the same command goes"
                        f" on after block {run.measured} of {run.blocks}"
                    ) from error
                finally:
                    run.close()
                    if run.done:
                        folder.drop_slots()
            except (DamagedError, PlanMismatchError) as error:
                # Nothing but time is lost: another plan or damaged activations.
                folder.clear()
                listener(Notice(text=f"{error}; the bits are measured again"))


class _Run:
    """One measuring run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: QuantizationPlan,
        execution: ExecutionPlan,
        options: RunOptions,
        journal: Journal,
        passes: Passes,
        place: Path,
        windows: Windows,
    ) -> None:
        where = checkpoint.files.where
        self._architecture: Architecture = read_architecture(checkpoint.config, where)
        self._plan, self._journal, self._passes = plan, journal, passes
        self._windows = windows
        self._importance = make_importance(plan, windows)
        self._identity = SourceIdentity(checkpoint, journal, passes.check)
        device = torch.device(options.device)
        self._source = Source(
            checkpoint, self._architecture, plan, device, self._identity
        )
        self._move_to = mover(
            options,
            checkpoint,
            self._architecture,
            self._identity,
            journal,
            passes.check,
        )
        self._config = layer_config(self._architecture.family, checkpoint.config)
        compute = getattr(torch, plan.compute_type)
        family, length = self._architecture.family, plan.sequence_length
        self._rope = Rope(family, self._config, length, compute, device)
        self._online = planned_rotations(plan, self._architecture)
        self._streams_weights = execution.streams_weights
        width, listener = self._architecture.width, passes.listener
        self._slots = RunSlots(plan, width, execution, place, listener, device)

    @property
    def blocks(self) -> int:
        """Blocks of the model."""
        return self._architecture.blocks

    @property
    def measured(self) -> int:
        """Blocks that are measured."""
        last = self._journal.last_block()
        return 0 if last is None else last + 1

    @property
    def done(self) -> bool:
        """Whether all blocks are measured."""
        return self.measured == self.blocks

    def costs(self) -> Costs:
        """Measure the blocks that are left; gives the costs of all linears."""
        last = self._journal.last_block()
        blocks, first, tokens = self.blocks, self.measured, self._plan.sequences
        if not self.done:
            self._passes.listener(
                RunStarted(
                    blocks=blocks,
                    first_block=first,
                    tokens=tokens * self._plan.sequence_length,
                )
            )
        self._identity.start()
        self._journal.put({"blocks": str(blocks)})
        if last is None:
            self._move_to(OUTSIDE)
            for _ in self._passes.checked(self._source.embedding()):
                pass  # all of it is sound, and hashed
            slots, rows = self._slots.inputs_of(0), self._source.embedding_rows
            embed(slots, self._windows, rows, self._passes.check)
            self._commit(-1, 0.0, {})
        else:
            for slot in self._slots.inputs_of(first):
                slot.checksums = self._journal.chunks(slot.folder.name)
        for index in range(first, blocks):
            self._passes.check()
            self._move_to(index)
            began = time.monotonic()
            costs = self._block(index)
            seconds = time.monotonic() - began
            self._commit(index, seconds, costs)
            self._passes.listener(
                BlockFinished(block=index, seconds=seconds, records=())
            )
        self._move_to(blocks)
        self._identity.complete()
        return {
            name: {int(bits): cost for bits, cost in made.items()}
            for name, made in self._journal.linears().items()
        }

    def _block(self, index: int) -> Costs:
        tensors = self._source.block(index)
        compute = getattr(torch, self._plan.compute_type)
        linears = self._architecture.linears(index)
        weights, cast = placed(tensors, linears, compute, streams=self._streams_weights)
        family, rope, online = self._architecture.family, self._rope, self._online
        (slots,) = self._slots.of_block(index)
        block = Block(family, self._config, index, cast, rope, online=online)
        stream = Stream(block, slots, self._plan)
        meter = BlockMeter(
            index=index,
            stream=stream,
            weights=weights,
            types=self._source.linear_types(index),
            plan=self._plan,
            passes=self._passes,
            importance=self._importance,
            stages=self._architecture.stages(index),
        )
        return meter.run()

    def _commit(self, index: int, seconds: float, costs: Costs) -> None:
        slots = self._slots.inputs_of(index + 1)
        prefix = block_prefix(index)
        self._journal.finish_block(
            index,
            seconds,
            {slot.folder.name: slot.checksums for slot in slots},
            {
                prefix + linear: {str(bits): cost for bits, cost in made.items()}
                for linear, made in costs.items()
            },
            {},
            self._source.news(),
        )
        if index >= 0:
            self._slots.release_inputs_of(index)

    def close(self) -> None:
        """Stop the threads that hash, read and write."""
        self._identity.close()
        self._slots.close()
