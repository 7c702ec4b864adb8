"""The options of ``quantize`` and ``plan`` that say how weights become codes."""

from dataclasses import dataclass
from typing import Annotated

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.config.schemes import DEFAULT_GRID

from .declare import flag, value

CODES = "What decides the codes"


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The options that say how weights become codes; None is a default found later."""

    preset: Annotated[
        str | None,
        value(
            CODES,
            "--preset",
            "rsq-paper",
            "The paper's choices: 3 bits, a scale a row, 256 windows, one stream, full"
            " rotation, exact token weights; options beside it win.",
            default="none",
        ),
    ] = None
    bits: Annotated[
        int | None,
        value(
            CODES, "--bits", "2..8", "Bits per code.", default="4, or as --bpw has it"
        ),
    ] = None
    bpw: Annotated[
        float | None,
        value(
            CODES,
            "--bpw",
            "X",
            "Choose the bits of each linear, by what one more pass measures: X over the"
            " whole output.",
            default="off",
        ),
    ] = None
    group_size: Annotated[
        int,
        value(
            CODES,
            "--group-size",
            "32|64|128|-1",
            "Inputs that share a scale; -1 is one scale a row.",
        ),
    ] = 128
    override: Annotated[
        list[str] | None,
        value(
            CODES,
            "--override",
            "PATTERN=BITS[gGROUP]",
            'Other bits for some linears, such as "down_proj=4g64" or "v_proj@0-3=16"'
            " (blocks 0 to 3 kept); may be repeated, the last that fits wins.",
            default="none",
        ),
    ] = None
    head_bits: Annotated[
        int,
        value(CODES, "--head-bits", "8|16", "Bits of the head; 16 is as the source."),
    ] = 16
    method: Annotated[
        str,
        value(
            CODES,
            "--method",
            "rsq|quarot|gptq|rtn|rotate",
            "rsq: rotate, weigh tokens, GPTQ; quarot: rotate, GPTQ; rtn: round; rotate:"
            " quantize nothing.",
        ),
    ] = "rsq"
    rotation: Annotated[
        str | None,
        value(
            CODES,
            "--rotation",
            "portable|full|none",
            "portable: folded into the weights, nothing left to do at inference; full:"
            " also the inputs of o and down, which only this tool's load_model runs.",
            default="by method",
        ),
    ] = None
    grid: Annotated[
        str,
        value(
            CODES,
            "--grid",
            "|".join(GRIDS),
            "nf: NormalFloat; e8p: an 8-dimensional lattice, for 2 bits and a scale a"
            " row. Both need rsq_stream.load_model: no runtime reads them.",
        ),
    ] = DEFAULT_GRID
    output_format: Annotated[
        str | None,
        value(
            CODES,
            "--format",
            "|".join(FORMATS),
            "How codes are stored; a grid that the format has no place for is refused.",
            default="by grid",
        ),
    ] = None
    symmetric: Annotated[
        bool,
        flag(
            CODES,
            "--symmetric/--asymmetric",
            "Codes around zero, or a zero point per group.",
        ),
    ] = True
    signed_scales: Annotated[
        bool | None,
        flag(
            CODES,
            "--signed-scales/--unsigned-scales",
            "Let the symmetric grid be mirrored, at no cost in the format.",
            default="signed if symmetric",
        ),
    ] = None
    group_scales: Annotated[
        str,
        value(
            CODES,
            "--group-scales",
            "dynamic|static",
            "Search a group's scale when the sweep reaches it, or before.",
        ),
    ] = "dynamic"
    clip_exponent: Annotated[
        float,
        value(
            CODES,
            "--clip-exponent",
            "E",
            "A scale is searched for the least sum of |error|^E.",
        ),
    ] = 2.0
    damping: Annotated[
        float,
        value(
            CODES,
            "--damping",
            "SHARE",
            "Added to the Hessian's diagonal, as a share of its mean.",
        ),
    ] = 0.01
    shrinkage: Annotated[
        float | None,
        value(
            CODES,
            "--shrinkage",
            "C",
            "Damping added for few tokens: C times the inputs per calibration token.",
            default="1 for rsq, else 0",
        ),
    ] = None
    propagate: Annotated[
        float | None,
        value(
            CODES,
            "--propagate",
            "A",
            "Share of earlier layers' error to make up for; 0 carries one stream.",
            default="0.5 for rsq, else 0",
        ),
    ] = None
    propagate_override: Annotated[
        list[str] | None,
        value(
            CODES,
            "--propagate-override",
            "PATTERN=A",
            'Another share for some linears, such as "down_proj=0.3" or "*@0-3=0.7".',
            default="none",
        ),
    ] = None
    residual_correction: Annotated[
        bool,
        flag(
            CODES,
            "--residual-correction/--no-residual-correction",
            "With --propagate, o and down also make up for the residual's error.",
        ),
    ] = True
    act_order: Annotated[
        bool,
        flag(
            CODES,
            "--act-order/--no-act-order",
            "Quantize heavy inputs first; groups stay whole, columns in place.",
        ),
    ] = False
    sweeps: Annotated[
        int | None,
        value(
            CODES,
            "--sweeps",
            "N",
            "Passes of coordinate descent over the codes; each costs like the solver.",
            default="2 for rsq, else 0",
        ),
    ] = None
    refit: Annotated[
        bool | None,
        flag(
            CODES,
            "--refit/--no-refit",
            "Fit the scales to the codes once they stand.",
            default="refit for rsq",
        ),
    ] = None
    seed: Annotated[
        int, value(CODES, "--seed", "N", "Of the rotation and of the windows.")
    ] = 0
    revision: Annotated[
        str | None,
        value(
            CODES,
            "--revision",
            "REV",
            "Branch, tag or commit on the hub.",
            default="its default branch",
        ),
    ] = None
