"""Run options with every default filled in: where an output goes, what computes."""

from os import PathLike
from pathlib import Path
from typing import Any

from rsq_stream.config.run_options import RunOptions, parse_size
from rsq_stream.config.settings import Settings
from rsq_stream.errors import UsageError
from rsq_stream.planning.devices import pick_device, pick_workers


def run_options(
    model: str | PathLike[str],
    settings: Settings,
    *,
    output: Path | None = None,
    work_dir: Path | None = None,
    device: str | None = None,
    ram: int | str | None = None,
    vram: int | str | None = None,
    threads: int | None = None,
    imagined: bool = False,
    **more: Any,
) -> RunOptions:
    """Fill in the run options of a model: where its output goes, and what computes.

    By default the output is ``MODEL-METHOD-Nbit`` in the current folder, the work
    folder ``OUTPUT.work`` beside it, and the device a GPU if there is one. ``ram`` and
    ``vram`` are bytes, or a text such as ``8GiB``; ``more`` are other fields of
    ``RunOptions``.
    An ``imagined`` GPU need not be here: its ``vram`` is planned for.

    Raises
    ------
    UsageError
        A size is none, there is no such device, or ``vram`` is given for a CPU.
    """
    place = pick_device(device, imagined=imagined and vram is not None)
    if vram is not None and place == "cpu":
        raise UsageError(
            "--vram is for a GPU, and this run computes on the CPU: leave it out, or"
            " give --ram"
        )
    output = output or Path(default_name(model, settings))
    if not output.name:  # the current folder, or a parent of it
        output = output.resolve()
    if not output.name:
        raise UsageError(f"--output {output}: must be a folder of its own")
    return RunOptions(
        output=output,
        work_dir=work_dir or output.with_name(output.name + ".work"),
        device=place,
        ram_bytes=_bytes("--ram", ram),
        vram_bytes=_bytes("--vram", vram),
        workers=pick_workers(threads, place),
        **more,
    )


def _bytes(option: str, size: int | str | None) -> int | None:
    return parse_size(option, size) if isinstance(size, str) else size


def default_name(model: str | PathLike[str], settings: Settings) -> str:
    """Return the name of an output folder: ``Llama-3-8B-rsq-2bit``."""
    name = f"{Path(model).resolve().name}-{settings.method}"
    if settings.method == "rotate":
        return name
    if settings.bpw is not None:
        return f"{name}-{settings.bpw:g}bpw"
    return f"{name}-{settings.usual_bits}bit"
