"""From options to a checked checkpoint, a plan, and how it runs on this machine.

Whatever can be refused is refused here or by what this calls, before the first
block; torch is imported inside the functions, so that ``--help`` stays light.
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.run_options import RunOptions
from rsq_stream.errors import UsageError, one_of

from ..display.text import parse_size, remark, size
from .importance import require_taken
from .quantize_options import QuantizeOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rsq_stream.calibration.windows import Windows
    from rsq_stream.checkpoint.shards import Checkpoint
    from rsq_stream.config.settings import Settings
    from rsq_stream.pipeline.job import Job

USUAL_BITS = 4
LEAST_BITS = 2
"""Stands in a plan with ``--bpw`` until the bits are chosen."""
ROTATIONS = ("portable", "full", "none")


def prepare(
    model: str,
    job: QuantizeOptions,
    *,
    read_calibration: bool,
    checkpoint: "Checkpoint | None" = None,
    imagined: bool = False,
) -> "Job":
    """Open the model, check every option, and plan; nothing is written.

    Without ``read_calibration`` the plan lacks the hash of the windows, and
    nothing is asked of the network but the model, and that only where its
    ``checkpoint`` is not open already. A plan may be ``imagined``: with ``--vram``, for
    a card that is not here.

    Raises
    ------
    UsageError
        Options that exclude each other, or ``--vram`` where no GPU computes.
    """
    settings = settings_of(job)
    device = pick_device(job.device, imagined=imagined and job.vram is not None)
    if job.vram is not None and device == "cpu":
        raise UsageError(
            "--vram is for a GPU, and this run computes on the CPU: leave it out, or"
            " give --ram"
        )
    options = run_options(model, job, device)

    import torch

    from rsq_stream.pipeline.job import Job
    from rsq_stream.planning.execution_plan import plan_execution
    from rsq_stream.planning.quantization_plan import make_plan
    from rsq_stream.planning.validate import inspect_checkpoint

    checkpoint = checkpoint or open_checkpoint(model, job.revision)
    architecture = inspect_checkpoint(checkpoint)
    place = torch.device(device)
    if place.type == "cuda":
        make_deterministic()
    # A first time without the text: a bad option must not wait for it.
    plan = make_plan(checkpoint, architecture, settings, None, place)
    if job.bpw is not None:
        from rsq_stream.pipeline.bit_allocation.choose_bits import require_reachable

        require_reachable(checkpoint, architecture, plan, job.bpw)
    if options.vram_bytes is not None and not imagined:
        options = on_this_card(options, place)
    execution = plan_execution(checkpoint, architecture, plan, options)
    if options.vram_bytes is not None and torch.cuda.is_available():
        from rsq_stream.planning.memory.fit import CONTEXT_BYTES
        from rsq_stream.runtime.device_memory import cap

        cap(place, options.vram_bytes - CONTEXT_BYTES)
    windows = None
    if read_calibration and plan.needs_calibration:
        windows = calibration_windows(job, plan, checkpoint)
        plan = make_plan(checkpoint, architecture, settings, windows, place)
    return Job(
        checkpoint=checkpoint,
        plan=plan,
        execution=execution,
        options=options,
        windows=windows,
        architecture=architecture,
    )


def on_this_card(options: RunOptions, place: "torch.device") -> RunOptions:
    """Take of ``--vram`` what the card has free: others may be on it."""
    from rsq_stream.planning.memory.fit import CONTEXT_BYTES
    from rsq_stream.runtime.device_memory import free_bytes

    # What is free lies beside this process's own context, which --vram is about too.
    most = free_bytes(place) + CONTEXT_BYTES
    if options.vram_bytes is None or options.vram_bytes <= most:
        return options
    given, there = size(options.vram_bytes), size(most)
    remark(
        "warning", f"--vram {given}: the card has {there} left, so that is planned for"
    )
    return dataclasses.replace(options, vram_bytes=most)


def settings_of(job: QuantizeOptions) -> "Settings":
    """Take from the options what decides the output's bytes.

    Raises
    ------
    UsageError
        Options that exclude each other, or a value that no plan would show.
    """
    if job.rotation is not None and job.rotation not in ROTATIONS:
        raise UsageError(f"--rotation must be {one_of(ROTATIONS)}, not {job.rotation}")
    if job.sequence_length is not None and job.sequence_length < 2:
        raise UsageError(
            f"--sequence-length must be 2 or more, not {job.sequence_length}"
        )
    if job.signed_scales and not job.symmetric:
        raise UsageError("--signed-scales needs --symmetric: a zero point does as much")
    if job.signed_scales and not GRIDS[job.grid].takes_signed_scales:
        raise UsageError(f"--signed-scales: --grid {job.grid} is its own mirror")
    if job.bpw is not None and not GRIDS[job.grid].mixed_bits:
        raise UsageError(f"--bpw chooses among integers: leave --grid {job.grid} out")
    if job.bpw is not None and job.bits is not None:
        raise UsageError("--bpw chooses the bits: leave --bits out")
    if job.bpw is not None and job.method in ("rtn", "rotate"):
        raise UsageError(
            f"--bpw measures on calibration text, which {job.method} does without"
        )
    if job.method == "rotate" and (
        job.bits is not None or job.override or job.head_bits != 16
    ):
        raise UsageError("--method rotate quantizes nothing: leave bits out")
    require_taken(job)

    from rsq_stream.calibration.text import DATA_SETS
    from rsq_stream.config.settings import Settings

    given = {
        field.name: getattr(job, field.name)
        for field in dataclasses.fields(Settings)
        if hasattr(job, field.name)
    }
    if job.signed_scales is None:
        given["signed_scales"] = job.symmetric
    given["bits_chosen"] = job.bpw is not None
    usual = LEAST_BITS if given["bits_chosen"] else USUAL_BITS
    given["bits"] = usual if job.bits is None else job.bits
    given["propagate_overrides"] = tuple(job.propagate_override or ())
    given["importance_linears"] = tuple(sorted(job.importance_linears or ()))
    given["overrides"] = tuple(job.override or ())
    if job.calibration not in DATA_SETS:
        given["calibration"] = "file"  # its windows are hashed; its path is not
    return Settings(**given)


def run_options(model: str, job: QuantizeOptions, device: str) -> RunOptions:
    """Take from the options what may change on resume."""
    ram_bytes = None if job.ram is None else parse_size("--ram", job.ram)
    vram_bytes = None if job.vram is None else parse_size("--vram", job.vram)
    name = Path(model).resolve().name
    bits = USUAL_BITS if job.bits is None else job.bits
    kind = f"{bits}bit" if job.bpw is None else f"{job.bpw:g}bpw"
    kind = "" if job.method == "rotate" else f"-{kind}"
    output = job.output or Path(f"{name}-{job.method}{kind}")
    if not output.name:  # the folder that one is in
        output = output.resolve()
    if not output.name:
        raise UsageError(f"--output {output}: must be a folder of its own")
    work_dir = job.work_dir or output.with_name(output.name + ".work")
    return RunOptions(
        output=output,
        work_dir=work_dir,
        device=device,
        ram_bytes=ram_bytes,
        vram_bytes=vram_bytes,
        workers=pick_workers(job.threads, device),
        units_in_flight=job.batch,
        allow_device_change=job.allow_device_change,
        evict_source=job.evict_source,
        restart=job.restart,
        keep_work=job.keep_work,
    )


def calibration_windows(
    job: QuantizeOptions, plan: QuantizationPlan, checkpoint: "Checkpoint"
) -> "Windows":
    """Read the calibration text and take the plan's windows of it."""
    from rsq_stream.calibration.text import read_text
    from rsq_stream.calibration.windows import Windows, choose_windows
    from rsq_stream.runtime.host_memory import give_back_free_memory

    text = read_text(job.calibration, plan.seed)
    window_BT = choose_windows(
        text,
        tokenizer_of(checkpoint),
        plan.samples,
        plan.sequence_length,
        plan.seed,
        job.calibration,
    )
    # The text and what the tokenizer took would lie in the heap's way of the run.
    del text
    give_back_free_memory()
    return Windows(window_BT, plan.expand)


def open_checkpoint(model: str, revision: str | None = None) -> "Checkpoint":
    """Open a folder or hub id by its headers."""
    from rsq_stream.checkpoint.files import open_files
    from rsq_stream.checkpoint.shards import Checkpoint

    return Checkpoint(open_files(model, revision))


def tokenizer_of(checkpoint: "Checkpoint") -> "PreTrainedTokenizerBase":
    """Load a checkpoint's tokenizer; of a hub id, its small files are fetched."""
    from rsq_stream.calibration.tokenizer import load_tokenizer
    from rsq_stream.checkpoint.files import SIDE_FILES

    for name in SIDE_FILES:
        checkpoint.files.exists(name)  # of a hub id, this fetches the file
    return load_tokenizer(checkpoint.files.path("config.json").parent)


def pick_device(wanted: str | None, *, imagined: bool = False) -> str:
    """Give the device: as asked and checked, else CUDA where there is one.

    An ``imagined`` one is CUDA, here or not.

    Raises
    ------
    UsageError
        No device of that name is here.
    """
    import torch

    if wanted is None or (wanted == "cuda" and imagined):
        return "cuda" if imagined or torch.cuda.is_available() else "cpu"
    known = ["cpu"]
    if torch.cuda.is_available():
        known += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if wanted not in known:
        raise UsageError(
            f"--device must be one of {', '.join(known)} on this machine, not {wanted}"
        )
    return wanted


def make_deterministic() -> None:
    """Have CUDA give the same bits each time; before its first product."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def pick_workers(wanted: int | None, device: str) -> int:
    """Give the threads: as asked, else one with a GPU, else the cores there are."""
    if wanted is not None:
        return wanted
    return 1 if device.startswith("cuda") else cores()


def cores() -> int:
    """Count the physical cores, no more than this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
