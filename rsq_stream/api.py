"""Everything that the command line does, in Python: plan, quantize, evaluate, verify.

    >>> from rsq_stream import Settings, quantize, run_options
    >>> settings = Settings(bits=2)
    >>> options = run_options("path/to/model", settings, ram="8GiB")
    >>> summary = quantize("path/to/model", settings, options)  # doctest: +SKIP

Settings decide the output's bytes; run options say where and how fast. Nothing is
printed: what is worth saying goes to a ``listener`` as events. The same call goes on
where a run was stopped.
"""

import dataclasses
import threading
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from rsq_stream.calibration.text import read_text
from rsq_stream.checkpoint.manifest import served_rounding
from rsq_stream.checkpoint.opening import Model, open_checkpoint, tokenizer_of
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.run_options import RunOptions
from rsq_stream.config.settings import Settings
from rsq_stream.errors import UsageError
from rsq_stream.evaluation.progress import counting_on
from rsq_stream.evaluation.result import Evaluated, require_text
from rsq_stream.events import Listener, ignore
from rsq_stream.output.verify import Verification
from rsq_stream.pipeline.bit_allocation.choose_bits import Choice, require_reachable
from rsq_stream.pipeline.job import Job, RunSummary
from rsq_stream.planning.calibration import calibration_windows
from rsq_stream.planning.devices import (
    limit_to_card,
    make_deterministic,
    pick_device,
    pick_workers,
    within_card,
)
from rsq_stream.planning.execution_plan import plan_execution
from rsq_stream.planning.quantization_plan import make_plan
from rsq_stream.planning.run_options import run_options as run_options
from rsq_stream.planning.validate import inspect_checkpoint, require_consistent


def plan(
    model: Model | Checkpoint,
    settings: Settings,
    options: RunOptions,
    *,
    revision: str | None = None,
    imagined: bool = False,
    listener: Listener = ignore,
) -> Job:
    """Open the model, check every setting, and plan; no text is read, nothing written.

    The plan lacks the hash of the calibration windows. With ``imagined`` the GPU of
    ``options`` need not be here. On a GPU torch stays deterministic, and limited to
    ``vram``, afterwards: call this before anything else uses CUDA.

    Raises
    ------
    UsageError
        Settings that exclude each other or that the model cannot follow.
    CheckpointError, UnsupportedModelError
        The model is damaged, or of a family or type that this tool does not know.
    BudgetError
        The stated memory cannot hold the smallest unit of work.
    """
    require_consistent(settings)
    checkpoint = (
        model if isinstance(model, Checkpoint) else open_checkpoint(model, revision)
    )
    architecture = inspect_checkpoint(checkpoint)
    device = torch.device(options.device)
    if device.type == "cuda":
        make_deterministic()
    quantization = make_plan(checkpoint, architecture, settings, None, device=device)
    if settings.bpw is not None:
        require_reachable(checkpoint, architecture, quantization, settings.bpw)
    if options.vram_bytes is not None and not imagined:
        options = within_card(options, listener)
    execution = plan_execution(checkpoint, architecture, quantization, options)
    if not imagined:
        limit_to_card(options)
    return Job(
        checkpoint=checkpoint,
        architecture=architecture,
        plan=quantization,
        execution=execution,
        options=options,
        windows=None,
    )


def prepare(
    model: Model | Checkpoint,
    settings: Settings,
    options: RunOptions,
    *,
    revision: str | None = None,
    listener: Listener = ignore,
) -> Job:
    """Plan, then read the calibration text: all that a run needs.

    A bad setting is refused before the text is read.

    Raises
    ------
    CalibrationError
        The text cannot be read, or is shorter than one window.
    RsqError
        Whatever ``plan`` raises.
    """
    job = plan(model, settings, options, revision=revision, listener=listener)
    if not job.plan.needs_calibration:
        return job
    windows = calibration_windows(settings.calibration, job.plan, job.checkpoint)
    device = torch.device(job.options.device)
    quantization = make_plan(
        job.checkpoint, job.architecture, settings, windows, device=device
    )
    return dataclasses.replace(job, plan=quantization, windows=windows)


def choose_bits(
    job: Job,
    bpw: float,
    *,
    listener: Listener = ignore,
    stop: threading.Event | None = None,
) -> tuple[Job, Choice]:
    """Measure what bits cost, unless that was done, and choose them for ``bpw``.

    Returns the job with the bits chosen, and what the choice is expected to do.

    Raises
    ------
    UsageError
        ``bpw`` is out of reach, or the job has no calibration windows.
    Interrupted
        ``stop`` was set: finished blocks are kept.
    """
    from rsq_stream.pipeline.bit_allocation.choose_bits import choose_bits as choose
    from rsq_stream.pipeline.bit_allocation.measure import measure, sensitivity_plan

    parts = job.checkpoint, job.architecture
    if job.windows is None:
        raise UsageError("bits are chosen by calibration text: give a job of prepare()")
    require_reachable(*parts, job.plan, bpw)
    measuring = sensitivity_plan(job.plan)
    # Libraries and text that came since are in what each plan has to spare.
    used = job.execution.used_bytes
    execution = plan_execution(
        *parts, measuring, job.options, measures=True, used_bytes=used
    )
    measured = dataclasses.replace(job, plan=measuring, execution=execution)
    costs = measure(measured, listener=listener, stop=stop)
    choice = choose(*parts, job.plan, costs=costs, bpw=bpw)
    execution = plan_execution(*parts, choice.plan, job.options, used_bytes=used)
    return dataclasses.replace(job, plan=choice.plan, execution=execution), choice


def quantize(
    model: Model | Checkpoint,
    settings: Settings,
    options: RunOptions,
    *,
    revision: str | None = None,
    listener: Listener = ignore,
    stop: threading.Event | None = None,
) -> RunSummary:
    """Quantize a model into ``options.output``, going on where a run stopped.

    Raises
    ------
    Interrupted
        ``stop`` was set: the same call goes on after the last finished stage.
    RsqError
        Whatever else went wrong, in one line.
    """
    from rsq_stream.pipeline.quantize import quantize as run

    job = prepare(model, settings, options, revision=revision, listener=listener)
    if settings.bpw is not None:
        job, _ = choose_bits(job, settings.bpw, listener=listener, stop=stop)
    return run(job, listener=listener, stop=stop)


def evaluate(
    model: Model | Checkpoint,
    text: str | PathLike[str],
    *,
    against: Model | Checkpoint | None = None,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    bos: bool = False,
    activations: Mapping[str, Any] | None = None,
    sample: str | None = None,
    sample_tokens: int = 32,
    device: str | None = None,
    threads: int | None = None,
    listener: Listener = ignore,
) -> Evaluated:
    """Measure perplexity on a text, and the divergence from another model.

    ``activations`` replaces fields of the ``ActivationRounding`` that the folder was
    calibrated for; None leaves a field as it is. ``sample`` is a prompt.

    Raises
    ------
    UsageError
        A number is out of bounds, or there is no such device.
    CalibrationError
        The text cannot be read, or is shorter than one window.
    """
    require_text(str(text))
    for option, value, least in (
        ("--sequence-length", sequence_length, 2),
        ("--max-windows", max_windows, 1),
        ("--sample-tokens", sample_tokens, 1),
        ("--threads", threads, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{option} must be {least} or more, not {value}")
    place = pick_device(device)

    from rsq_stream.evaluation.generation import greedy_sample
    from rsq_stream.evaluation.perplexity import evaluate as evaluate_windows
    from rsq_stream.evaluation.perplexity import evaluation_windows, window_length

    checkpoint = _opened(model)
    other = _opened(against) if against is not None else None
    calibrated_for = served_rounding(checkpoint)
    other_rounding = served_rounding(other) if other is not None else None
    scheme = calibrated_for.changed(dict(activations or {}))
    length = window_length(checkpoint, sequence_length)
    window_BT = evaluation_windows(
        read_text(str(text), 0, "--text"),
        tokenizer_of(checkpoint),
        length,
        bos=bos,
        max_windows=max_windows,
        where=str(text),
    )
    evaluation = evaluate_windows(
        checkpoint,
        window_BT,
        against=other,
        scheme=scheme,
        workers=pick_workers(threads, place),
        device=place,
        listener=counting_on(listener, [checkpoint, *([other] if other else [])]),
    )
    written = None
    if sample is not None:
        written = greedy_sample(
            checkpoint, sample, sample_tokens, scheme=scheme, device=place
        )
    return Evaluated(
        evaluation=evaluation,
        sequence_length=length,
        simulated=scheme,
        calibrated_for=calibrated_for,
        against=other_rounding,
        sample=written,
    )


def _opened(model: Model | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def verify(output: Model, *, against: Model | Checkpoint | None = None) -> Verification:
    """Check every file, tensor and bit of an output; with its source, each linear too.

    Raises
    ------
    OutputError
        There is no finished output here at all.
    CheckpointError
        ``against`` is not the source that the output was made from.
    """
    from rsq_stream.output.verify import verify as verify_folder

    source = _opened(against) if against is not None else None
    return verify_folder(Path(output), source)
