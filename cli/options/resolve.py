"""From the options of the command line to the library's settings, options and jobs.

Torch is imported inside the functions, so that ``--help`` stays light.
"""

import dataclasses
from typing import TYPE_CHECKING

from rsq_stream.config.run_options import RunOptions
from rsq_stream.config.settings import Settings

from ..display.progress import announce
from .quantize_options import QuantizeOptions

if TYPE_CHECKING:
    from rsq_stream.checkpoint.shards import Checkpoint
    from rsq_stream.pipeline.job import Job

_RENAMED = {
    "overrides": "override",
    "propagate_overrides": "propagate_override",
}
"""Settings whose option is in the singular, because it is given once a value."""
_PLACE = (
    *("output", "work_dir", "device", "ram", "vram", "threads"),
    *("allow_device_change", "evict_source", "restart", "keep_work"),
)


def prepare(
    model: str,
    options: QuantizeOptions,
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
    from rsq_stream.planning.validate import require_consistent

    settings = settings_of(options)
    require_consistent(settings)

    from rsq_stream import api

    place = run_options_of(model, options, settings, imagined=imagined)
    source, revision = checkpoint or model, options.revision
    if read_calibration:
        return api.prepare(
            source, settings, place, revision=revision, listener=announce
        )
    return api.plan(
        source,
        settings,
        place,
        revision=revision,
        imagined=imagined,
        listener=announce,
    )


def settings_of(options: QuantizeOptions) -> Settings:
    """Take from the options what decides the output's bytes."""
    fields = (field.name for field in dataclasses.fields(Settings))
    named = ((name, _RENAMED.get(name, name)) for name in fields)
    chosen = {
        name: getattr(options, option)
        for name, option in named
        if hasattr(options, option)  # not all settings are options
    }
    for name in ("overrides", "propagate_overrides"):
        chosen[name] = tuple(chosen[name] or ())
    chosen["importance_linears"] = tuple(sorted(options.importance_linears or ()))
    return Settings(**chosen)


def run_options_of(
    model: str, options: QuantizeOptions, settings: Settings, *, imagined: bool = False
) -> RunOptions:
    """Take from the options what may change on resume."""
    from rsq_stream.planning.run_options import run_options

    given = {name: getattr(options, name) for name in _PLACE}
    given["units_in_flight"] = options.batch
    return run_options(model, settings, imagined=imagined, **given)
