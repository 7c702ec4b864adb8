"""Read shard -> rotate -> (per stage: importance -> Hessian -> solve) -> pack ->
write -> journal -> next block.
"""  # noqa: D205  the sentence that the package is built around

import dataclasses
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from rsq_stream.algorithm.solver import Solution
from rsq_stream.block_progress import BlockProgress
from rsq_stream.block_solver import BlockSolver, make_grid, round_block
from rsq_stream.calibration import Windows
from rsq_stream.config import ExecutionPlan, QuantizationPlan, RunOptions
from rsq_stream.errors import Interrupted, ScratchError
from rsq_stream.events import (
    BlockFinished,
    LinearRecord,
    Listener,
    RunStarted,
    ShardFinished,
    ignore,
)
from rsq_stream.model.architecture import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEARS,
    block_prefix,
    read_architecture,
)
from rsq_stream.model.block import Block, Rope, layer_config
from rsq_stream.ops.pool import single_threaded_products
from rsq_stream.output_folder import OutputFolder
from rsq_stream.packed_format import encode_linear, output_is_tied, scheme_for
from rsq_stream.passes import Passes
from rsq_stream.slots import RunSlots
from rsq_stream.source import Source
from rsq_stream.storage import atomic
from rsq_stream.storage.journal import Journal
from rsq_stream.storage.run_folder import RunFolder
from rsq_stream.storage.shards import Checkpoint


@dataclass(frozen=True)
class RunSummary:
    """What a finished run made."""

    output: Path
    seconds: float
    resumed_at: int
    """The first block that this process did; 0 for an uninterrupted run."""
    records: tuple[LinearRecord, ...]
    output_bytes: int


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
        The work folder holds an unfinished run of another plan.
    Interrupted
        ``stop`` was set: everything up to the last finished block is kept.
    RsqError
        Whatever else went wrong, in one line.
    """
    began = time.monotonic()
    OutputFolder.require_apart(options.output, options.work_dir)
    with (
        RunFolder(options.work_dir) as folder,
        single_threaded_products(options.workers) as pool,
    ):
        if options.restart and folder.has_run:
            if folder.recorded("output") == str(options.output.resolve()):
                OutputFolder.discard_unfinished(options.output)
            folder.clear()
        OutputFolder.require_usable(options.output, resuming=folder.has_run)
        if not folder.has_run:
            _require_room(execution, options)
        journal = folder.open_journal(plan.canonical_json(), plan.sha256)
        passes = Passes(pool, execution.in_flight, listener, stop or threading.Event())
        run = _Run(checkpoint, plan, execution, options, journal, passes)
        try:
            first = run.begin(windows)
            for index in range(first, run.architecture.blocks):
                run.block(index)
            output_bytes = run.finish()
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
    records = tuple(run.records.values())
    return RunSummary(options.output, seconds, first, records, output_bytes)


def _require_room(execution: ExecutionPlan, options: RunOptions) -> None:
    """Refuse a new run that the disks cannot hold; a resumed one has its room."""
    needs = (
        (options.output, execution.output_bytes),
        (options.work_dir, execution.scratch_bytes),
    )
    missing = atomic.shortage(needs)
    if missing:
        raise ScratchError(missing)


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
    ) -> None:
        self.architecture = read_architecture(checkpoint.config, checkpoint.files.where)
        self.finished = 0
        self.records = {
            name: LinearRecord(**made) for name, made in journal.linears().items()
        }
        self._plan = plan
        self._device = torch.device(options.device)
        self._journal = journal
        self._work_dir = options.work_dir
        self._passes = passes
        self._output = OutputFolder(
            options.output, checkpoint, self.architecture, plan, journal
        )
        self._source = Source(checkpoint, self.architecture, plan, self._device)
        self._config = layer_config(self.architecture.family, checkpoint.config)
        self._slots: RunSlots | None = None
        if plan.needs_calibration:
            self._slots = RunSlots(
                plan,
                self.architecture.width,
                execution,
                options.work_dir,
                passes.listener,
            )
            self._rope = Rope(
                self.architecture.family,
                self._config,
                plan.sequence_length,
                getattr(torch, plan.compute_type),
                self._device,
            )

    def begin(self, windows: Windows | None) -> int:
        """Write what lies outside the blocks, embed; gives the first block to do."""
        facts = {"blocks": str(self.architecture.blocks)}
        facts["output"] = str(self._output.path.resolve())
        self._journal.put(facts)
        last = self._journal.last_block()
        first = 0 if last is None else last[0] + 1
        self.finished = first
        plan = self._plan
        tokens = plan.sequences * plan.sequence_length if plan.needs_calibration else 0
        self._passes.listener(
            RunStarted(
                blocks=self.architecture.blocks, first_block=first, tokens=tokens
            )
        )
        if last is None:
            self._write_outer(windows)
        elif self._slots:
            self._slots.input_of(first).checksums = self._journal.chunks(last[1])
        return first

    def _write_outer(self, windows: Windows | None) -> None:
        """Write embedding, final norm and head; embed the calibration windows."""
        if not output_is_tied(self.architecture, self._plan):
            self._output.write({HEAD: self._source.head()})
        embedding_VD = self._source.embedding()
        norm_D = self._source.final_norm()
        self._output.write({EMBEDDING: embedding_VD, FINAL_NORM: norm_D})
        if windows is not None and self._slots:
            kept = {"windows": windows.window_BT.to(torch.int32)}
            atomic.write_file(self._work_dir / "windows.safetensors", save(kept))
            slot = self._slots.input_of(0)
            for unit in range(slot.shape.units):
                self._passes.check()
                count = slot.shape.unit_sequences
                token_BT = windows.tokens(unit * count, count)
                x_BTD = embedding_VD[token_BT].to(slot.shape.dtype)
                slot.write(unit, x_BTD, durable=True)
            slot.flush(durable=True)
        self._commit(-1, 0.0, [])

    def block(self, index: int) -> None:
        """Do one block: read, rotate, solve, pack, write, journal."""
        began = time.monotonic()
        tensors = self._source.block(index)
        self._output.write(self._source.unquantized(index, tensors))
        records = self._solve(index, tensors)
        self._commit(index, time.monotonic() - began, records)

    def _solve(self, index: int, tensors: dict[str, Tensor]) -> list[LinearRecord]:
        prefix = block_prefix(index)
        types = self._source.linear_types(index)
        grids = {name: make_grid(self._plan, dtype) for name, dtype in types.items()}

        def keep(linear: str, solution: Solution) -> None:
            scheme = scheme_for(self._plan, solution.code_OI.shape[1])
            self._output.write(
                encode_linear(prefix + linear, solution, scheme, types[linear])
            )

        weights = {name: tensors[f"{name}.weight"] for name in LINEARS}
        if self._slots is None:
            tensors.clear()
            passes = self._passes
            return round_block(index, weights, grids, self._plan, passes, keep)
        compute = getattr(torch, self._plan.compute_type)
        block = Block(
            self.architecture.family,
            self._config,
            index,
            {name: tensor.to(compute) for name, tensor in tensors.items()},
            self._rope,
        )
        tensors.clear()
        slots = self._slots.of_block(index)
        progress = BlockProgress(
            self._plan, self._journal, self._output, slots.h, self._work_dir
        )
        done, token_weights = progress.restore(index, block)
        return BlockSolver(
            index,
            block,
            weights,
            grids,
            self._plan,
            slots,
            self._passes,
            keep,
            partial(progress.finish_stage, index),
            token_weights,
        ).run(done)

    def _commit(self, index: int, seconds: float, records: list[LinearRecord]) -> None:
        """Make a block's bytes durable, then journal it, then name full shards."""
        self._output.sync()
        slot = self._slots.input_of(index + 1) if self._slots else None
        self._journal.finish_block(
            index,
            slot.folder.name if slot else "",
            seconds,
            slot.checksums if slot else {},
            {made.name: dataclasses.asdict(made) for made in records},
            self._output.new_checksums(),
        )
        self.records.update({made.name: made for made in records})
        self.finished = index + 1
        if index >= 0:
            own = tuple(made for made in self.records.values() if made.block == index)
            self._passes.listener(
                BlockFinished(block=index, seconds=seconds, records=own)
            )
        self._name_full_shards()

    def _name_full_shards(self) -> None:
        for name, size in self._output.name_full_shards():
            self._passes.listener(ShardFinished(name=name, bytes=size))

    def finish(self) -> int:
        """Name the last shards and write the small files; gives the bytes in all."""
        self._name_full_shards()
        return self._output.write_small_files(list(self.records.values()))

    def close(self) -> None:
        """Stop the activation threads and close the shards."""
        if self._slots:
            self._slots.close()
        self._output.close()
