"""What every part of a run works with: opened, gone on with, closed."""

import dataclasses
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rsq_stream.checkpoint.hub_shards import (
    AllShardsStay,
    ShardFetcher,
    bytes_to_fetch,
    shard_fetcher_for,
)
from rsq_stream.checkpoint.source import Source
from rsq_stream.checkpoint.source_identity import SourceIdentity
from rsq_stream.config.quantization_plan import DEVICE_FIELDS, QuantizationPlan
from rsq_stream.errors import Interrupted, ScratchError
from rsq_stream.events import LinearRecord, Listener
from rsq_stream.model.activation_quantizer import AS_COMPUTED, ActivationQuantizer
from rsq_stream.model.block import Block
from rsq_stream.model.online_rotation import OnlineRotations, planned_rotations
from rsq_stream.model.transformers_layers import Rope, layer_config
from rsq_stream.output.folder import OutputFolder
from rsq_stream.output.folder_checks import (
    discard_unfinished,
    require_apart,
    require_usable,
)
from rsq_stream.output.write_behind import WriteBehind
from rsq_stream.pipeline import disk_space
from rsq_stream.pipeline.activations.calibration_pass import CalibrationPasses, stopper
from rsq_stream.pipeline.activations.slots import RunSlots, copy_stream
from rsq_stream.pipeline.job import Job
from rsq_stream.pipeline.stage_profile import StageProfiler
from rsq_stream.pipeline.token_importance import TokenImportance, make_importance
from rsq_stream.runtime.worker_pool import single_threaded_products
from rsq_stream.storage.journal import Journal
from rsq_stream.storage.work_folder import WorkFolder


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What all blocks of a calibrated run share."""

    importance: TokenImportance
    slots: RunSlots
    """Where the activations lie."""
    config: PretrainedConfig
    rope: Rope
    online: OnlineRotations

    @classmethod
    def of(cls, job: Job, passes: CalibrationPasses) -> "Calibration":
        """Make importance, rotary tables and activation slots for a job."""
        assert job.windows is not None
        plan, options = job.plan, job.options
        device = torch.device(options.device)
        family = job.architecture.family
        config = layer_config(family, job.checkpoint.config)
        return cls(
            importance=make_importance(plan, job.windows),
            slots=RunSlots(job, listener=passes.listener),
            config=config,
            rope=Rope(
                family,
                config,
                tokens=plan.sequence_length,
                dtype=getattr(torch, plan.compute_type),
                device=device,
            ),
            online=planned_rotations(plan, job.architecture),
        )

    def block(
        self,
        job: Job,
        index: int,
        tensors: Mapping[str, Tensor],
        quantizer: ActivationQuantizer = AS_COMPUTED,
    ) -> Block:
        """Build a block of the run from its tensors, which it does not copy."""
        return Block(
            job.architecture.family,
            self.config,
            index,
            tensors,
            rope=self.rope,
            online=self.online,
            quantizer=quantizer,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """The state that every part of a run shares; it is seen in ``pipeline`` alone."""

    job: Job
    device: torch.device
    journal: Journal
    identity: SourceIdentity
    source: Source
    hub_shards: ShardFetcher | AllShardsStay
    passes: CalibrationPasses

    @property
    def finished_blocks(self) -> int:
        """The number of blocks that are journalled."""
        return self.journal.finished_blocks

    def close(self) -> None:
        """Stop the threads that hash the source."""
        self.identity.close()


@dataclass(frozen=True, kw_only=True)
class QuantizationRun(Run):
    """A run that writes an output."""

    output: OutputFolder
    codes: WriteBehind
    """What the solver's codes go through on their way to the output."""
    calibration: Calibration | None
    """None where no activation is looked at."""

    @property
    def calibrated(self) -> Calibration:
        """What the blocks of a calibrated run share."""
        assert self.calibration is not None
        return self.calibration

    @property
    def records(self) -> list[LinearRecord]:
        """What was done to each linear so far."""
        linears = self.journal.linears().values()
        return [LinearRecord(**fields) for fields in linears]

    def close(self) -> None:
        """Stop the threads that hash, read and write, and close the shards."""
        super().close()
        self.codes.close()
        if self.calibration is not None:
            self.calibration.slots.close()
        self.output.close()


@contextmanager
def open_run(
    job: Job, listener: Listener, stop: threading.Event
) -> Iterator[QuantizationRun]:
    """Lock the work folder, check the disks, and take up what a killed run left.

    The work folder is removed at the end of a run that was not interrupted.

    Raises
    ------
    PlanMismatchError
        The work folder holds an unfinished run of another plan or source.
    Interrupted
        ``stop`` was set; the message says after which block the run goes on.
    """
    options = job.options
    require_apart(options.output, options.work_dir)
    to_fetch = partial(bytes_to_fetch, job.checkpoint, options)
    with (
        disk_space.explaining_full_disk(job.execution, options, to_fetch),
        WorkFolder(options.work_dir) as folder,
        single_threaded_products(options.workers, stopper(stop)) as pool,
        closing(StageProfiler(torch.device(options.device))) as profiler,
    ):
        if options.restart and folder.has_run:
            if folder.recorded("output") == str(options.output.resolve()):
                discard_unfinished(options.output)
            folder.clear()
        require_usable(options.output, resuming=folder.has_run)
        if missing := disk_space.missing_space(job.execution, options, to_fetch()):
            raise ScratchError(missing)
        may_differ = DEVICE_FIELDS if options.allow_device_change else ()
        plan = job.plan
        journal = folder.open_journal(plan.canonical_json(), plan.sha256, may_differ)
        job = dataclasses.replace(job, plan=resume_on_device(journal, plan))
        passes = CalibrationPasses(
            pool=pool,
            in_flight=job.execution.in_flight,
            listener=listener,
            stop=stop,
            profiler=profiler,
        )
        run = _assembled(job, journal, passes)
        try:
            yield run
        except Interrupted as error:
            raise Interrupted(
                "stopped; the same command goes on after"
                f" block {run.finished_blocks} of {job.architecture.blocks}"
            ) from error
        finally:
            run.close()
        if not options.keep_work:
            folder.remove()


def _assembled(
    job: Job, journal: Journal, passes: CalibrationPasses
) -> QuantizationRun:
    """Make the parts of a run, each from those before it."""
    run = base_run(job, journal, passes)
    output = OutputFolder(
        job.options.output,
        job.checkpoint,
        architecture=job.architecture,
        plan=job.plan,
        journal=journal,
    )
    calibrated = job.plan.needs_calibration
    return QuantizationRun(
        **vars(run),
        output=output,
        codes=WriteBehind(output, copy_stream(run.device) if calibrated else None),
        calibration=Calibration.of(job, passes) if calibrated else None,
    )


def base_run(job: Job, journal: Journal, passes: CalibrationPasses) -> Run:
    """Open the source of a job, hashed and rotated, and its shards on the hub."""
    identity = SourceIdentity(job.checkpoint, journal, passes.check)
    device = torch.device(job.options.device)
    source = Source(
        job.checkpoint,
        architecture=job.architecture,
        plan=job.plan,
        device=device,
        identity=identity,
        check=passes.check,
    )
    return Run(
        job=job,
        device=device,
        journal=journal,
        identity=identity,
        source=source,
        hub_shards=shard_fetcher_for(
            job.options,
            job.checkpoint,
            architecture=job.architecture,
            identity=identity,
            journal=journal,
            check=passes.check,
        ),
        passes=passes,
    )


def resume_on_device(journal: Journal, plan: QuantizationPlan) -> QuantizationPlan:
    """Return the journal's plan, after noting there a change of device."""
    journalled = QuantizationPlan.from_fields(
        json.loads(journal.get("plan") or plan.canonical_json())
    )
    changes = json.loads(journal.get("device_changes") or "[]")
    last_kind = changes[-1]["device_kind"] if changes else journalled.device_kind
    if last_kind != plan.device_kind:
        block = journal.finished_blocks
        changes.append({"from_block": block, "device_kind": plan.device_kind})
        journal.put({"device_changes": json.dumps(changes)})
    return journalled
