"""The options that ``quantize`` and ``plan`` share: a new knob is a new field here."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .options import PLACE, Device, Threads

_CODES = "What decides the codes"
_TEXT = "Calibration"


def _value(panel: str, name: str, metavar: str, text: str, default: Any = True) -> Any:
    """Declare an option; ``default`` says in words what None stands for."""
    return typer.Option(
        name, metavar=metavar, help=text, show_default=default, rich_help_panel=panel
    )


def _flag(panel: str, name: str, text: str, default: Any = True) -> Any:
    return typer.Option(name, help=text, show_default=default, rich_help_panel=panel)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The options of ``quantize`` and ``plan``; None is a default found later."""

    bits: Annotated[int, _value(_CODES, "--bits", "2..8", "Bits per code.")] = 4
    group_size: Annotated[
        int,
        _value(
            _CODES,
            "--group-size",
            "32|64|128|-1",
            "Inputs that share a scale; -1 is one scale a row.",
        ),
    ] = 128
    override: Annotated[
        list[str] | None,
        _value(
            _CODES,
            "--override",
            "PATTERN=BITS[gGROUP]",
            'Other bits for some linears, such as "down_proj=4g64" or "v_proj@0-3=16"'
            " (blocks 0 to 3 kept); may be repeated, the last that fits wins.",
            "none",
        ),
    ] = None
    head_bits: Annotated[
        int,
        _value(_CODES, "--head-bits", "8|16", "Bits of the head; 16 is as the source."),
    ] = 16
    method: Annotated[
        str,
        _value(
            _CODES,
            "--method",
            "rsq|quarot|gptq|rtn",
            "rsq: rotate, weigh tokens, GPTQ; quarot: rotate, GPTQ; rtn: round.",
        ),
    ] = "rsq"
    rotation: Annotated[
        str | None,
        _value(
            _CODES,
            "--rotation",
            "portable|none",
            "portable: folded into the weights, nothing left to do at inference.",
            "by method",
        ),
    ] = None
    symmetric: Annotated[
        bool,
        _flag(
            _CODES,
            "--symmetric/--asymmetric",
            "Codes around zero, or a zero point per group.",
        ),
    ] = True
    signed_scales: Annotated[
        bool | None,
        _flag(
            _CODES,
            "--signed-scales/--unsigned-scales",
            "Let the symmetric grid be mirrored, at no cost in the format.",
            "signed if symmetric",
        ),
    ] = None
    group_scales: Annotated[
        str,
        _value(
            _CODES,
            "--group-scales",
            "dynamic|static",
            "Search a group's scale when the sweep reaches it, or before.",
        ),
    ] = "dynamic"
    clip_exponent: Annotated[
        float,
        _value(
            _CODES,
            "--clip-exponent",
            "E",
            "A scale is searched for the least sum of |error|^E.",
        ),
    ] = 2.0
    damping: Annotated[
        float,
        _value(
            _CODES,
            "--damping",
            "SHARE",
            "Added to the Hessian's diagonal, as a share of its mean.",
        ),
    ] = 0.01
    propagate: Annotated[
        float | None,
        _value(
            _CODES,
            "--propagate",
            "A",
            "Share of earlier layers' error to make up for; 0 carries one stream.",
            "0.5 for rsq, else 0",
        ),
    ] = None
    act_order: Annotated[
        bool,
        _flag(
            _CODES,
            "--act-order/--no-act-order",
            "Quantize heavy inputs first; groups stay whole, columns in place.",
        ),
    ] = False
    sweeps: Annotated[
        int,
        _value(
            _CODES,
            "--sweeps",
            "N",
            "Passes of coordinate descent over the codes; each costs like the solver.",
        ),
    ] = 0
    refit: Annotated[
        bool,
        _flag(
            _CODES, "--refit/--no-refit", "Fit the scales to the codes once they stand."
        ),
    ] = False
    seed: Annotated[
        int, _value(_CODES, "--seed", "N", "Of the rotation and of the windows.")
    ] = 0
    revision: Annotated[
        str | None,
        _value(
            _CODES,
            "--revision",
            "REV",
            "Branch, tag or commit on the hub.",
            "its default branch",
        ),
    ] = None
    importance: Annotated[
        str | None,
        _value(
            _TEXT,
            "--importance",
            "attncon|first-n|uniform",
            "How much each token counts.",
            "attncon for rsq, else uniform",
        ),
    ] = None
    importance_min: Annotated[
        float | None,
        _value(
            _TEXT,
            "--importance-min",
            "R",
            "Weight of the least important token.",
            "min(1, 20 / sequence length)",
        ),
    ] = None
    importance_max: Annotated[
        float,
        _value(_TEXT, "--importance-max", "R", "Weight of the most important token."),
    ] = 1.0
    importance_tokens: Annotated[
        int | None,
        _value(
            _TEXT,
            "--importance-tokens",
            "N",
            "N of first-n.",
            "a quarter of the window",
        ),
    ] = None
    calibration: Annotated[
        str,
        _value(
            _TEXT,
            "--calibration",
            "wikitext2|c4|FILE",
            "A data set, or a .txt, .jsonl or .parquet file.",
        ),
    ] = "wikitext2"
    samples: Annotated[int, _value(_TEXT, "--samples", "N", "Calibration windows.")] = (
        256
    )
    sequence_length: Annotated[
        int | None,
        _value(
            _TEXT,
            "--sequence-length",
            "TOKENS",
            "Tokens per window.",
            "4096, or the model's limit",
        ),
    ] = None
    expand: Annotated[
        int, _value(_TEXT, "--expand", "M", "Rolled copies per window, 1 for none.")
    ] = 1
    output: Annotated[
        Path | None,
        _value(
            PLACE,
            "--output",
            "DIR",
            "Where the quantized model goes: a new or empty folder.",
            "MODEL-METHOD-Nbit, here",
        ),
    ] = None
    work_dir: Annotated[
        Path | None,
        _value(
            PLACE,
            "--work-dir",
            "DIR",
            "Journal and activations; removed at the end.",
            "OUTPUT.work",
        ),
    ] = None
    device: Device = None
    ram: Annotated[
        str | None,
        _value(
            PLACE,
            "--ram",
            "SIZE",
            "Host memory the whole process may use, such as 8GiB.",
            "what is free",
        ),
    ] = None
    threads: Threads = None
    batch: Annotated[
        int, _value(PLACE, "--batch", "N", "Units in flight.", "two a thread")
    ] = 0
    allow_device_change: Annotated[
        bool,
        _flag(
            PLACE,
            "--allow-device-change",
            "Go on with a run of another kind of device; other bytes, and recorded.",
            False,
        ),
    ] = False
    restart: Annotated[
        bool,
        _flag(PLACE, "--restart", "Drop an unfinished run in the work folder.", False),
    ] = False
    keep_work: Annotated[
        bool, _flag(PLACE, "--keep-work", "Leave the work folder at the end.", False)
    ] = False


def takes_job(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of ``Job`` as options; it is called with ``job``."""
    hints = get_type_hints(Job, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(Job)
    ]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "job"
    ]

    def spread(**given: Any) -> None:
        job = Job(**{option.name: given.pop(option.name) for option in options})
        command(job=job, **given)

    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    parameters = [*own[:1], *options, *own[1:]]
    spread.__annotations__ = {made.name: made.annotation for made in parameters}
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spread
