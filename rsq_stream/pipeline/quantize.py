"""Read shard -> rotate -> (per stage: importance -> Hessian -> solve) -> pack ->
write -> journal -> next block.
"""  # noqa: D205  the sentence that the package is built around

import threading
import time
from dataclasses import asdict, astuple, replace

import torch
from safetensors.torch import save
from torch import Tensor

from rsq_stream.checkpoint.hub_shards import NO_BLOCK
from rsq_stream.events import (
    BlockFinished,
    LinearRecord,
    Listener,
    RunStarted,
    ShardFinished,
    ignore,
)
from rsq_stream.pipeline.block_progress import commit_stage
from rsq_stream.pipeline.block_setup import embed_windows, open_block
from rsq_stream.pipeline.block_solver import round_block
from rsq_stream.pipeline.embedding_and_head import EmbeddingAndHead
from rsq_stream.pipeline.job import Job, RunSummary
from rsq_stream.pipeline.preflight import solve_largest_once
from rsq_stream.pipeline.repair import Repairs
from rsq_stream.pipeline.run import QuantizationRun, open_run
from rsq_stream.pipeline.stage_profile import StageUsage, added_up
from rsq_stream.storage import atomic
from rsq_stream.storage.journal import Progress


def quantize(
    job: Job, *, listener: Listener = ignore, stop: threading.Event | None = None
) -> RunSummary:
    """Quantize a checkpoint into the job's output, going on where a run stopped.

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
    with open_run(job, listener, stop or threading.Event()) as run:
        if job.execution.solves_largest_first and job.plan.needs_calibration:
            solve_largest_once(run.job, run.passes)
        repairs = Repairs(run)
        first = repairs.repairing(begin)
        for index in range(first, run.job.architecture.blocks):
            repairs.repairing(quantize_block, index)
            # Apart from the block, which is journalled by now and never done again.
            repairs.repairing(name_full_shards)
        output_bytes = repairs.repairing(seal)
        summary = RunSummary(
            output=run.job.options.output,
            seconds=0.0,
            resumed_at=first,
            records=tuple(run.records),
            output_bytes=output_bytes,
            stages=added_up(StageUsage(*row) for row in run.journal.timings()),
        )
    return replace(summary, seconds=time.monotonic() - began)


def begin(run: QuantizationRun) -> int:
    """Write what lies outside the blocks, embed; return the first block to do."""
    blocks, first = run.job.architecture.blocks, run.finished_blocks
    where = str(run.output.path.resolve())
    run.journal.put({"blocks": str(blocks), "output": where})
    run.output.require_intact()
    plan = run.job.plan
    tokens = plan.sequences * plan.sequence_length if plan.needs_calibration else 0
    run.passes.listener(RunStarted(blocks=blocks, first_block=first, tokens=tokens))
    run.identity.start()
    if run.journal.last_block() is None:
        with run.passes.profiler.stage("embedding and head"):
            write_embedding_and_head(run)
    elif run.calibration is not None:
        run.calibration.slots.expect_inputs_of(first, run.journal)
    return first


def write_embedding_and_head(run: QuantizationRun) -> None:
    """Write embedding, final norm and head; embed the calibration windows."""
    run.hub_shards.advance_to(NO_BLOCK)
    outer = EmbeddingAndHead(run.source, run.job.plan, run.passes.pool)
    for part in (outer.head, outer.norm, outer.embedding):
        run.output.write_chunks(run.passes.checked(part()))
    windows = run.job.windows
    if windows is not None and run.calibration is not None:
        kept = {"windows": windows.window_BT.to(torch.int32)}
        path = run.job.options.work_dir / "windows.safetensors"
        atomic.write_file(path, save(kept))
        embed_windows(run, windows)
    commit_block(run, NO_BLOCK, 0.0, [])
    name_full_shards(run)  # `begin`, done again, finds the commit


def quantize_block(run: QuantizationRun, index: int) -> None:
    """Take one block from full precision to codes, durably."""
    began, profiler = time.monotonic(), run.passes.profiler
    run.hub_shards.advance_to(index)
    with profiler.stage("read and rotate"):
        tensors = run.source.block(index)
        if run.job.execution.prefetches_blocks:
            run.source.read_ahead(index + 1)
        run.output.write(run.source.unquantized(index, tensors))
    if run.calibration is None:
        with profiler.stage("round"):
            records = round_block(run, index, tensors)
    else:
        records = solve_block(run, index, tensors)
    commit_block(run, index, time.monotonic() - began, records)


def solve_block(
    run: QuantizationRun, index: int, tensors: dict[str, Tensor]
) -> list[LinearRecord]:
    """Solve a block stage by stage, each journalled, and write the block's outputs."""
    block, records = open_block(run, index, tensors), []
    with run.codes:
        for number, stage in block.remaining_stages:
            solved = block.solve_stage(stage)  # importance, Hessian, codes, written
            weights = block.statistics.token_weights
            commit_stage(run, index, number, records=solved, token_weights=weights)
            records += solved
        block.write_outputs()  # the next block's input
    return records


def commit_block(
    run: QuantizationRun, index: int, seconds: float, records: list[LinearRecord]
) -> None:
    """Make a block's bytes durable, then journal it."""
    run.output.sync()
    slots = run.calibration.slots if run.calibration else None
    run.journal.finish_block(
        index,
        Progress(
            chunks=slots.checksums_of(index + 1) if slots else {},
            linears={record.name: asdict(record) for record in records},
            tensors=run.output.new_checksums(),
            source=run.source.unjournalled(),
        ),
        seconds=seconds,
        timings=[astuple(taken) for taken in run.passes.profiler.unjournalled()],
    )
    if index != NO_BLOCK:
        if slots:
            slots.release_inputs_of(index)
        own = tuple(record for record in run.records if record.block == index)
        run.passes.listener(BlockFinished(block=index, seconds=seconds, records=own))


def name_full_shards(run: QuantizationRun) -> None:
    """Check the shards that are whole, and give them their names."""
    if run.output.has_full_shards:
        run.identity.complete()
    for name, size in run.output.name_full_shards():
        run.passes.listener(ShardFinished(name=name, bytes=size))


def seal(run: QuantizationRun) -> int:
    """Name the last shards, write the small files; return the bytes in all."""
    name_full_shards(run)
    run.hub_shards.advance_to(run.job.architecture.blocks)
    run.output.require_whole()
    return run.output.write_small_files(run.records, run.identity.shards())
