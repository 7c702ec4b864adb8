"""Read shard -> rotate -> (per stage: importance -> Hessian -> solve) -> pack ->
write -> journal -> next block.
"""  # noqa: D205  the sentence that the package is built around

import dataclasses
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsq_stream.algorithm.rotation import make_rotation
from rsq_stream.algorithm.solver import Solution
from rsq_stream.block_solver import (
    BlockSolver,
    Slots,
    make_grid,
    round_block,
)
from rsq_stream.calibration import Windows
from rsq_stream.config import ExecutionPlan, QuantizationPlan, RunOptions
from rsq_stream.errors import Interrupted
from rsq_stream.events import (
    BlockFinished,
    LinearRecord,
    Listener,
    Notice,
    RunStarted,
    ShardFinished,
    ignore,
)
from rsq_stream.model.architecture import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEARS,
    Architecture,
    block_prefix,
    read_architecture,
)
from rsq_stream.model.block import Block, Rope, layer_config
from rsq_stream.model.rotate import ModelRotation
from rsq_stream.ops.pool import single_threaded_products
from rsq_stream.output_folder import OutputFolder
from rsq_stream.packed_format import encode_linear, output_is_tied, scheme_for
from rsq_stream.passes import Passes
from rsq_stream.storage import atomic
from rsq_stream.storage.activations import Slot, SlotShape, has_direct_io
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
    if options.restart:
        OutputFolder.discard_unfinished(options.output)
        atomic.remove_tree(options.work_dir)
    OutputFolder.require_usable(options.output, options.work_dir)
    with (
        RunFolder(options.work_dir, plan.canonical_json(), plan.sha256) as folder,
        single_threaded_products(options.workers) as pool,
    ):
        stop = stop or threading.Event()
        passes = Passes(pool, execution.in_flight, listener, stop)
        run = _Run(checkpoint, plan, execution, options, folder.journal, passes)
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
        self._checkpoint = checkpoint
        self._plan = plan
        self._device = torch.device(options.device)
        self._journal = journal
        self._passes = passes
        self._output = OutputFolder(
            options.output, checkpoint, self.architecture, plan, journal
        )
        self._rotation = _rotation(plan, self.architecture)
        self._config = layer_config(self.architecture.family, checkpoint.config)
        self._slots: list[Slot] = []
        if plan.needs_calibration:
            self._make_slots(execution, options.work_dir)

    def _make_slots(self, execution: ExecutionPlan, work_dir: Path) -> None:
        plan = self._plan
        shape = SlotShape(
            sequences=plan.sequences,
            tokens=plan.sequence_length,
            width=self.architecture.width,
            unit_sequences=plan.unit_sequences,
            dtype=getattr(torch, plan.cache_type),
        )
        with atomic.explained(work_dir):
            direct = has_direct_io(work_dir)
        if not direct:
            text = f"{work_dir}: no direct I/O here, so writes are buffered and fsynced"
            self._passes.listener(Notice(text=text))
        self._resident = execution.resident_units
        self._slots = [
            Slot(work_dir / name, shape, resident, execution.in_flight, direct=direct)
            for name, resident in (
                ("even", self._resident),
                ("odd", self._resident),
                ("h", self._resident),
            )
        ]
        self._rope = Rope(
            self.architecture.family,
            self._config,
            plan.sequence_length,
            getattr(torch, plan.compute_type),
            self._device,
        )

    def begin(self, windows: Windows | None) -> int:
        """Write what lies outside the blocks, embed; gives the first block to do."""
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
        elif plan.needs_calibration:
            self._slots[first % 2].checksums = self._journal.chunks(last[1])
        return first

    def _write_outer(self, windows: Windows | None) -> None:
        """Write embedding, final norm and head; embed the calibration windows."""
        read, rotation = self._checkpoint.read, self._rotation
        embedding_VD = read(EMBEDDING)
        norm_D = read(FINAL_NORM)
        tied = self.architecture.tied
        if not output_is_tied(self.architecture, self._plan):
            head_VD = embedding_VD if tied else read(HEAD)
            rotated = rotation.head(head_VD, norm_D) if rotation else head_VD
            self._output.write({HEAD: rotated})
            del head_VD, rotated
        if rotation:
            embedding_VD = rotation.embedding(embedding_VD)
            norm_D = torch.ones_like(norm_D)
        self._output.write({EMBEDDING: embedding_VD, FINAL_NORM: norm_D})
        if windows is not None and self._slots:
            slot = self._slots[0]
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
        tensors = self._read_block(index)
        if self._rotation:
            tensors = self._rotation.block(tensors)
        self._write_unquantized(index, tensors)
        records = self._solve(index, tensors)
        self._commit(index, time.monotonic() - began, records)

    def _read_block(self, index: int) -> dict[str, Tensor]:
        names = list(self.architecture.block_shapes())
        read = self._checkpoint.read_many(block_prefix(index), names)
        return {name: read[name].to(self._device).float() for name in names}

    def _write_unquantized(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write norms and biases in the source's type."""
        prefix = block_prefix(index)
        self._output.write(
            {
                prefix + name: tensor.to(self._checkpoint.entry(prefix + name).dtype)
                for name, tensor in tensors.items()
                if name.removesuffix(".weight") not in LINEARS
            }
        )

    def _solve(self, index: int, tensors: dict[str, Tensor]) -> list[LinearRecord]:
        prefix = block_prefix(index)
        types = {
            name: self._checkpoint.entry(f"{prefix}{name}.weight").dtype
            for name in LINEARS
        }
        grids = {name: make_grid(self._plan, dtype) for name, dtype in types.items()}

        def keep(linear: str, solution: Solution) -> None:
            scheme = scheme_for(self._plan, solution.code_OI.shape[1])
            self._output.write(
                encode_linear(prefix + linear, solution, scheme, types[linear])
            )

        weights = {name: tensors[f"{name}.weight"] for name in LINEARS}
        if not self._plan.needs_calibration:
            tensors.clear()
            pool = self._passes.pool
            return round_block(index, weights, grids, self._plan, pool, keep)
        compute = getattr(torch, self._plan.compute_type)
        block = Block(
            self.architecture.family,
            self._config,
            index,
            {name: tensor.to(compute) for name, tensor in tensors.items()},
            self._rope,
        )
        tensors.clear()
        x, x_next = self._slots[index % 2], self._slots[(index + 1) % 2]
        slots = Slots(x, self._slots[2], x_next, self._resident)
        return BlockSolver(
            index, block, weights, grids, self._plan, slots, self._passes, keep
        ).run()

    def _commit(self, index: int, seconds: float, records: list[LinearRecord]) -> None:
        """Make a block's bytes durable, then journal it, then name full shards."""
        self._output.sync()
        slot = self._slots[(index + 1) % 2] if self._slots else None
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
            done = BlockFinished(block=index, seconds=seconds, records=tuple(records))
            self._passes.listener(done)
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
        for slot in self._slots:
            slot.close()
        self._output.close()


def _rotation(
    plan: QuantizationPlan, architecture: Architecture
) -> ModelRotation | None:
    """Build R1 and R2 from the plan; their signs come from the seed."""
    if plan.residual_rotation == "none":
        return None
    residual = make_rotation(plan.residual_rotation, architecture.width, plan.seed)
    # Another stream of signs, so that equal sizes do not get equal rotations.
    value = make_rotation(
        plan.value_rotation, architecture.head_width, plan.seed + 2**32
    )
    return ModelRotation(residual, value)
