"""The options that ``quantize`` and ``plan`` share: a new knob is a new field here."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .activations import Activations
from .common import PLACE_PANEL, Device, Threads
from .declare import flag, value
from .importance import Importance
from .presets import with_preset
from .quantization import Codes

_TEXT = "Calibration"


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Codes, Importance, Activations):
    """The options of ``quantize`` and ``plan``; None is a default found later."""

    calibration: Annotated[
        str,
        value(
            _TEXT,
            "--calibration",
            "wikitext2|c4|FILE",
            "A data set, or a .txt, .jsonl or .parquet file.",
        ),
    ] = "wikitext2"
    samples: Annotated[int, value(_TEXT, "--samples", "N", "Calibration windows.")] = (
        256
    )
    sequence_length: Annotated[
        int | None,
        value(
            _TEXT,
            "--sequence-length",
            "TOKENS",
            "Tokens per window.",
            default="4096, or the model's limit",
        ),
    ] = None
    expand: Annotated[
        int, value(_TEXT, "--expand", "M", "Rolled copies per window, 1 for none.")
    ] = 1
    output: Annotated[
        Path | None,
        value(
            PLACE_PANEL,
            "--output",
            "DIR",
            "Where the quantized model goes: a new or empty folder.",
            default="MODEL-METHOD-Nbit, here",
        ),
    ] = None
    work_dir: Annotated[
        Path | None,
        value(
            PLACE_PANEL,
            "--work-dir",
            "DIR",
            "Journal and activations; removed at the end.",
            default="OUTPUT.work",
        ),
    ] = None
    device: Device = None
    ram: Annotated[
        str | None,
        value(
            PLACE_PANEL,
            "--ram",
            "SIZE",
            "Host memory the whole process may use, such as 8GiB.",
            default="what is free",
        ),
    ] = None
    vram: Annotated[
        str | None,
        value(
            PLACE_PANEL,
            "--vram",
            "SIZE",
            "GPU memory the whole process may use; plan also takes a card's that is"
            " not here.",
            default="what is free",
        ),
    ] = None
    threads: Threads = None
    batch: Annotated[
        int,
        value(PLACE_PANEL, "--batch", "N", "Units in flight.", default="two a thread"),
    ] = 0
    allow_device_change: Annotated[
        bool,
        flag(
            PLACE_PANEL,
            "--allow-device-change",
            "Go on with a run of another kind of device; other bytes, and recorded.",
            default=False,
        ),
    ] = False
    evict_source: Annotated[
        bool,
        flag(
            PLACE_PANEL,
            "--evict-source",
            "Of a hub id: fetch shards ahead, remove them from the cache after use.",
            default=False,
        ),
    ] = False
    restart: Annotated[
        bool,
        flag(
            PLACE_PANEL,
            "--restart",
            "Drop an unfinished run in the work folder.",
            default=False,
        ),
    ] = False
    keep_work: Annotated[
        bool,
        flag(
            PLACE_PANEL,
            "--keep-work",
            "Leave the work folder at the end.",
            default=False,
        ),
    ] = False


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the fields of ``QuantizeOptions`` to a command, called with ``options``."""
    hints = get_type_hints(QuantizeOptions, include_extras=True)
    added = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(QuantizeOptions)
    ]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]

    def spread(context: Any, **given: Any) -> None:
        def is_given(name: str) -> bool:
            source = context.get_parameter_source(name)
            return source is not None and source.name != "DEFAULT"

        chosen = {option.name: given.pop(option.name) for option in added}
        command(options=QuantizeOptions(**with_preset(chosen, is_given)), **given)

    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    context = inspect.Parameter(
        "context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
    )
    parameters = [*own[:1], *added, *own[1:], context]
    spread.__annotations__ = {made.name: made.annotation for made in parameters}
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spread
