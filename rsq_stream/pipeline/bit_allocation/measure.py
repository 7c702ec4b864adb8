"""The pass before a run with ``--bpw``: what each linear costs at each number of bits.

One block at a time like the run itself, in full precision, into a work folder of its
own: killed, it goes on after the last finished block, and what was measured once serves
any target.
"""

import dataclasses
import threading
import time
from dataclasses import dataclass
from functools import partial

import torch

from rsq_stream.checkpoint.hub_shards import NO_BLOCK, bytes_to_fetch
from rsq_stream.config.activations import NOTHING
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import DamagedError, Interrupted, PlanMismatchError, ScratchError
from rsq_stream.events import BlockFinished, Listener, Notice, RunStarted, ignore
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.output.folder_checks import require_apart
from rsq_stream.pipeline import disk_space
from rsq_stream.pipeline.activations.calibration_pass import CalibrationPasses, stopper
from rsq_stream.pipeline.activations.slots import embed
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.pipeline.bit_allocation.block_sensitivity import BlockSensitivity
from rsq_stream.pipeline.bit_allocation.costs import PROBE_BITS, Costs
from rsq_stream.pipeline.block_setup import place_weights
from rsq_stream.pipeline.job import Job
from rsq_stream.pipeline.run import Calibration, Run, base_run
from rsq_stream.runtime.worker_pool import single_threaded_products
from rsq_stream.storage.journal import Journal, Progress
from rsq_stream.storage.work_folder import MEASURED, WorkFolder


def sensitivity_plan(plan: QuantizationPlan) -> QuantizationPlan:
    """Return the plan that costs depend on: without bits and the solver's extras.

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
    job: Job, *, listener: Listener = ignore, stop: threading.Event | None = None
) -> Costs:
    """Measure all linears of a model, by full name; at once where that was done before.

    The job's plan is that of ``sensitivity_plan``, its execution one that ``measures``.

    Raises
    ------
    Interrupted
        ``stop`` was set: finished blocks are kept.
    RsqError
        Whatever else went wrong, in one line.
    """
    options, stop = job.options, stop or threading.Event()
    require_apart(options.output, options.work_dir)
    here = dataclasses.replace(options, work_dir=options.work_dir / MEASURED)
    # Nothing of the output is written here.
    needs = dataclasses.replace(job.execution, output_bytes=0, small_bytes=0)
    job = dataclasses.replace(job, options=here)
    to_fetch = partial(bytes_to_fetch, job.checkpoint, options)
    with (
        disk_space.explaining_full_disk(needs, here, to_fetch),
        WorkFolder(here.work_dir) as folder,
        single_threaded_products(options.workers, stopper(stop)) as pool,
    ):
        passes = CalibrationPasses(
            pool=pool,
            in_flight=job.execution.in_flight,
            listener=listener,
            stop=stop,
        )
        if options.restart:
            folder.clear()
        if missing := disk_space.missing_space(needs, here, to_fetch()):
            raise ScratchError(missing)
        while True:
            try:
                journal = folder.open_journal(
                    job.plan.canonical_json(), job.plan.sha256
                )
                run = MeasuringRun.of(job, journal, passes)
                try:
                    return run.costs()
                except Interrupted as error:
                    raise Interrupted(
                        "stopped while measuring what bits cost; the same command goes"
                        f" on after block {run.finished_blocks} of"
                        f" {job.architecture.blocks}"
                    ) from error
                finally:
                    run.close()
                    if run.finished_blocks == job.architecture.blocks:
                        folder.drop_slots()
            except (DamagedError, PlanMismatchError) as error:
                # Nothing but time is lost: another plan or damaged activations.
                folder.clear()
                listener(Notice(text=f"{error}; the bits are measured again"))


@dataclass(frozen=True, kw_only=True)
class MeasuringRun(Run):
    """A run that writes no output: it only measures."""

    calibration: Calibration

    @classmethod
    def of(
        cls, job: Job, journal: Journal, passes: CalibrationPasses
    ) -> "MeasuringRun":
        """Make the parts of a run, and go on where the journal says."""
        run = base_run(job, journal, passes)
        return cls(**vars(run), calibration=Calibration.of(job, passes))

    def costs(self) -> Costs:
        """Measure the blocks that are left; return the costs of all linears."""
        blocks, first = self.job.architecture.blocks, self.finished_blocks
        plan, windows = self.job.plan, self.job.windows
        if first < blocks:
            tokens = plan.sequences * plan.sequence_length
            started = RunStarted(blocks=blocks, first_block=first, tokens=tokens)
            self.passes.listener(started)
        self.identity.start()
        self.journal.put({"blocks": str(blocks)})
        slots = self.calibration.slots
        if self.journal.last_block() is None:
            assert windows is not None
            self.hub_shards.advance_to(NO_BLOCK)
            for _ in self.passes.checked(self.source.embedding()):
                pass  # all of it is sound, and hashed
            rows = self.source.embedding_rows
            embed(slots.inputs_of(0), windows, rows, self.passes.check)
            self._commit(NO_BLOCK, 0.0, {})
        else:
            slots.expect_inputs_of(first, self.journal)
        for index in range(first, blocks):
            self.passes.check()
            self.hub_shards.advance_to(index)
            began = time.monotonic()
            costs = self._block(index)
            seconds = time.monotonic() - began
            self._commit(index, seconds, costs)
            self.passes.listener(
                BlockFinished(block=index, seconds=seconds, records=())
            )
        self.hub_shards.advance_to(blocks)
        self.identity.complete()
        return {
            name: {int(bits): cost for bits, cost in row.items()}
            for name, row in self.journal.linears().items()
        }

    def _block(self, index: int) -> Costs:
        job, shared = self.job, self.calibration
        weights, cast = place_weights(
            self.source.block(index),
            job.architecture.linears(index),
            getattr(torch, job.plan.compute_type),
            offloads=job.execution.offloads_weights,
        )
        (slots,) = shared.slots.of_block(index)
        block = shared.block(job, index, cast)
        stream = Stream(block=block, slots=slots, plan=job.plan)
        return BlockSensitivity(
            run=self,
            index=index,
            stream=stream,
            weights=weights,
            importance=shared.importance,
        ).run_all()

    def _commit(self, index: int, seconds: float, costs: Costs) -> None:
        slots, prefix = self.calibration.slots, block_prefix(index)
        progress = Progress(
            chunks=slots.checksums_of(index + 1),
            linears={
                prefix + linear: {str(bits): cost for bits, cost in row.items()}
                for linear, row in costs.items()
            },
            source=self.source.unjournalled(),
        )
        self.journal.finish_block(index, progress, seconds=seconds)
        if index != NO_BLOCK:
            slots.release_inputs_of(index)

    def close(self) -> None:
        """Stop the threads that hash, read and write."""
        super().close()
        self.calibration.slots.close()
