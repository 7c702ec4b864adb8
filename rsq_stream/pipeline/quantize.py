"""Read shard -> rotate -> (per stage: importance -> Hessian -> solve) -> pack ->
write -> journal -> next block.
"""  # noqa: D205  the sentence that the package is built around

import dataclasses
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from rsq_stream.calibration.windows import Windows
from rsq_stream.checkpoint.hub_shards import OUTSIDE, bytes_to_fetch, mover
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.checkpoint.source import Source
from rsq_stream.checkpoint.source_identity import SourceIdentity
from rsq_stream.config.execution_plan import ExecutionPlan
from rsq_stream.config.quantization_plan import DEVICE_FIELDS, QuantizationPlan
from rsq_stream.config.run_options import RunOptions
from rsq_stream.errors import DamagedError, Interrupted, ScratchError
from rsq_stream.events import (
    BlockFinished,
    LinearRecord,
    Listener,
    RunStarted,
    ShardFinished,
    ignore,
)
from rsq_stream.model.architecture import read_architecture
from rsq_stream.output.folder import OutputFolder
from rsq_stream.output.folder_checks import (
    discard_unfinished,
    require_apart,
    require_usable,
)
from rsq_stream.pipeline import disk_space
from rsq_stream.pipeline.activations.calibration_pass import Passes, stopper
from rsq_stream.pipeline.block_setup import set_up
from rsq_stream.pipeline.block_solver import round_block
from rsq_stream.pipeline.embedding_and_head import Outer
from rsq_stream.pipeline.job import RunSummary
from rsq_stream.pipeline.linear_schemes import keeper, schemes_and_grids
from rsq_stream.pipeline.repair import Rebuilder
from rsq_stream.pipeline.run import settled
from rsq_stream.pipeline.stage_profile import StageMeter, StageTaken, added_up
from rsq_stream.runtime.worker_pool import single_threaded_products
from rsq_stream.storage import atomic
from rsq_stream.storage.journal import Journal
from rsq_stream.storage.work_folder import RunFolder

Result = TypeVar("Result")


def quantize(
    checkpoint: Checkpoint,
    plan: QuantizationPlan,
    execution: ExecutionPlan,
    options: RunOptions,
    windows: Windows | None,
    *,
    listener: Listener = ignore,
    stop: threading.Event | None = None,
) -> RunSummary:
    """Quantize a checkpoint into ``options.output``, going on where a run stopped.

    Raises
    ------
    PlanMismatchError
        The work folder holds an unfinished run of another plan or source.
    Interrupted
        ``stop`` was set: everything up to the last finished stage is kept.
    RsqError
        Whatever else went wrong, in one line.
    """
    began = time.monotonic()
    stop = stop or threading.Event()
    require_apart(options.output, options.work_dir)
    to_fetch = partial(bytes_to_fetch, checkpoint, options)
    with (
        disk_space.said_when_full(execution, options, to_fetch),
        RunFolder(options.work_dir) as folder,
        single_threaded_products(options.workers, stopper(stop)) as pool,
        closing(StageMeter(torch.device(options.device))) as meter,
    ):
        if options.restart and folder.has_run:
            if folder.recorded("output") == str(options.output.resolve()):
                discard_unfinished(options.output)
            folder.clear()
        require_usable(options.output, resuming=folder.has_run)
        if missing := disk_space.shortage(execution, options, to_fetch()):
            raise ScratchError(missing)
        may_differ = DEVICE_FIELDS if options.allow_device_change else ()
        journal = folder.open_journal(plan.canonical_json(), plan.sha256, may_differ)
        plan = settled(journal, plan)
        passes = Passes(pool, execution.in_flight, listener, stop, meter)
        run = _Run(checkpoint, plan, execution, options, journal, passes, windows)
        try:
            first = run.mended(run.begin)
            while run.finished < run.architecture.blocks:
                run.mended(run.block)
            output_bytes = run.mended(run.finish)
            records = tuple(run.records.values())
            stages = added_up(StageTaken(*made) for made in journal.timings())
        except Interrupted as error:
            raise Interrupted(
                "stopped; the same command goes on after"
                f" block {run.finished} of {run.architecture.blocks}"
            ) from error
        finally:
            run.close()
        if not options.keep_work:
            folder.remove()
    seconds = time.monotonic() - began
    return RunSummary(options.output, seconds, first, records, output_bytes, stages)


class _Run:
    """The state of one run between blocks."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: QuantizationPlan,
        execution: ExecutionPlan,
        options: RunOptions,
        journal: Journal,
        passes: Passes,
        windows: Windows | None,
    ) -> None:
        self.architecture = read_architecture(checkpoint.config, checkpoint.files.where)
        self.finished = 0
        self._plan = plan
        self._journal = journal
        self._work_dir = options.work_dir
        self._passes = passes
        self._windows = windows
        self._identity = SourceIdentity(checkpoint, journal, passes.check)
        self._output = OutputFolder(
            options.output, checkpoint, self.architecture, plan, journal
        )
        self._device = device = torch.device(options.device)
        self._streams_weights = execution.streams_weights
        self._source = Source(
            checkpoint, self.architecture, plan, device, self._identity, passes.check
        )
        self._reads_ahead = execution.reads_ahead
        self._outer = Outer(self._source, plan, passes.pool)
        sources = checkpoint, self.architecture, self._identity
        self._move_to = mover(options, *sources, journal, passes.check)
        self._setup = None
        if plan.needs_calibration:
            assert windows is not None
            self._setup = set_up(
                checkpoint,
                self.architecture,
                plan,
                execution,
                device,
                self._source,
                self._output,
                journal,
                passes,
                options.work_dir,
                windows,
            )
        self._rebuilder = Rebuilder(
            journal,
            self._output,
            self._source,
            self._outer,
            self._setup,
            lambda block: self._round(block, self._source.block(block)),
            passes.listener,
        )

    @property
    def records(self) -> dict[str, LinearRecord]:
        """What was done to each linear so far, by its name."""
        done = self._journal.linears().items()
        return {name: LinearRecord(**fields) for name, fields in done}

    def mended(self, work: Callable[[], Result]) -> Result:
        """Do a piece of work; what it finds damaged is made again, if it can be."""
        while True:
            try:
                return work()
            except DamagedError as damage:
                self._rebuilder.rebuild(self.finished, self._windows, damage)

    def begin(self) -> int:
        """Write what lies outside the blocks, embed; gives the first block to do."""
        where = str(self._output.path.resolve())
        self._journal.put({"blocks": str(self.architecture.blocks), "output": where})
        last = self._journal.last_block()
        self.finished = first = 0 if last is None else last + 1
        self._output.require_intact()
        plan = self._plan
        tokens = plan.sequences * plan.sequence_length if plan.needs_calibration else 0
        self._passes.listener(
            RunStarted(
                blocks=self.architecture.blocks, first_block=first, tokens=tokens
            )
        )
        self._identity.start()
        if last is None:
            with self._passes.meter.stage("embedding and head"):
                self._write_outer()
        elif self._setup:
            for slot in self._setup.slots.inputs_of(first):
                slot.checksums = self._journal.chunks(slot.folder.name)
        return first

    def _write_outer(self) -> None:
        """Write embedding, final norm and head; embed the calibration windows."""
        self._move_to(OUTSIDE)
        for part in (self._outer.head, self._outer.norm, self._outer.embedding):
            self._output.write_chunks(self._passes.checked(part()))
        if self._windows is not None and self._setup:
            kept = {"windows": self._windows.window_BT.to(torch.int32)}
            atomic.write_file(self._work_dir / "windows.safetensors", save(kept))
            self._setup.embed(self._windows)
        self._commit(-1, 0.0, [])

    def block(self) -> None:
        """Do the next block: read, rotate, solve, pack, write, journal."""
        index, began = self.finished, time.monotonic()
        meter = self._passes.meter
        self._move_to(index)
        with meter.stage("read and rotate"):
            tensors = self._source.block(index)
            if self._reads_ahead:
                self._source.read_ahead(index + 1)
            self._output.write(self._source.unquantized(index, tensors))
        if self._setup is None:
            with meter.stage("round"):
                records = self._round(index, tensors)
        else:
            solver, done = self._setup.open(index, tensors)
            with self._setup.codes:
                records = solver.run(done)
        self._commit(index, time.monotonic() - began, records)

    def _round(self, index: int, tensors: dict[str, Tensor]) -> list[LinearRecord]:
        plan, source = self._plan, self._source
        schemes, grids = schemes_and_grids(index, plan, source, tensors)
        place = "cpu" if self._streams_weights else self._device
        weights = {name: tensors.pop(f"{name}.weight").to(place) for name in schemes}
        tensors.clear()
        keep = keeper(index, plan, source, self._output.write)
        rows, device, passes = plan.tile_rows_of, self._device, self._passes
        return round_block(index, weights, schemes, grids, rows, device, passes, keep)

    def _commit(self, index: int, seconds: float, records: list[LinearRecord]) -> None:
        """Make a block's bytes durable, then journal it, then name full shards."""
        self._output.sync()
        slots = self._setup.slots.inputs_of(index + 1) if self._setup else []
        self._journal.finish_block(
            index,
            seconds,
            {slot.folder.name: slot.checksums for slot in slots},
            {made.name: dataclasses.asdict(made) for made in records},
            self._output.new_checksums(),
            self._source.news(),
            [dataclasses.astuple(made) for made in self._passes.meter.news()],
        )
        self.finished = index + 1
        if index >= 0:
            if self._setup:
                self._setup.slots.release_inputs_of(index)
            own = tuple(made for made in self.records.values() if made.block == index)
            self._passes.listener(
                BlockFinished(block=index, seconds=seconds, records=own)
            )
        self._name_full_shards()

    def _name_full_shards(self) -> None:
        if self._output.has_full_shards:
            self._identity.complete()
        for name, size in self._output.name_full_shards():
            self._passes.listener(ShardFinished(name=name, bytes=size))

    def finish(self) -> int:
        """Name the last shards and write the small files; gives the bytes in all."""
        self._name_full_shards()
        self._move_to(self.architecture.blocks)
        self._output.require_whole()
        records, shards = list(self.records.values()), self._identity.shards()
        return self._output.write_small_files(records, shards)

    def close(self) -> None:
        """Stop the threads that hash, read and write, and close the shards."""
        self._identity.close()
        if self._setup:
            self._setup.close()
        self._output.close()
