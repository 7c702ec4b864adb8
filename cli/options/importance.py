"""The options of ``quantize`` and ``plan`` that say how much each token counts."""

from dataclasses import dataclass
from typing import Annotated

from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.errors import one_of

from .declare import flag, value

_PANEL = "Token importance"


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much each calibration token counts; None is a default found later."""

    importance: Annotated[
        str | None,
        value(
            _PANEL,
            "--importance",
            "STRATEGY",
            f"How much each token counts: {one_of(tuple(STRATEGIES))}.",
            default="attncon for rsq, else uniform",
        ),
    ] = None
    importance_min: Annotated[
        float | None,
        value(
            _PANEL,
            "--importance-min",
            "R",
            "Weight of the least important token.",
            default="min(1, 20 / sequence length)",
        ),
    ] = None
    importance_max: Annotated[
        float,
        value(_PANEL, "--importance-max", "R", "Weight of the most important token."),
    ] = 1.0
    importance_tokens: Annotated[
        int | None,
        value(
            _PANEL,
            "--importance-tokens",
            "N",
            "How many tokens count, in all or at each end, for strategies that take N.",
            default="the strategy's share of the window",
        ),
    ] = None
    importance_chunks: Annotated[
        str,
        value(
            _PANEL,
            "--importance-chunks",
            "C,C,.../T",
            "Which of T equal parts of a window count, from 0, for strategies that take"
            " parts.",
            default="none",
        ),
    ] = ""
    importance_power: Annotated[
        int,
        value(
            _PANEL,
            "--importance-power",
            "1|2",
            "1 weighs by r, as RSQ's code does, 2 by its square, as the paper prints.",
        ),
    ] = 1
    importance_visible: Annotated[
        str,
        value(
            _PANEL,
            "--importance-visible",
            "no|linear|root",
            "Divide scores by how many queries see the token, or by the root of that.",
        ),
    ] = "no"
    importance_transform: Annotated[
        str,
        value(
            _PANEL,
            "--importance-transform",
            "no|log|rank",
            "Of the scores, so that the largest do not set the scale of all.",
        ),
    ] = "no"
    importance_quantile: Annotated[
        float,
        value(
            _PANEL,
            "--importance-quantile",
            "Q",
            "Map from the quantiles Q and 1 - Q in place of least and most.",
        ),
    ] = 0.0
    importance_skip: Annotated[
        int,
        value(
            _PANEL,
            "--importance-skip",
            "N",
            "Leave the N largest scores (attention sinks) out of the mapping's bounds.",
        ),
    ] = 0
    importance_mask: Annotated[
        float,
        value(
            _PANEL,
            "--importance-mask",
            "SHARE",
            "The lowest tokens weigh 0, all others 1.",
        ),
    ] = 0.0
    importance_truncate: Annotated[
        float,
        value(
            _PANEL,
            "--importance-truncate",
            "SHARE",
            "The lowest tokens weigh 0, all others what they did.",
        ),
    ] = 0.0
    importance_bins: Annotated[
        int,
        value(
            _PANEL,
            "--importance-bins",
            "N",
            "N equal shares of the tokens get weights evenly from least to most.",
        ),
    ] = 0
    importance_reverse: Annotated[
        bool,
        flag(
            _PANEL,
            "--importance-reverse",
            "The lowest scores weigh most.",
            default=False,
        ),
    ] = False
    importance_exact: Annotated[
        bool,
        flag(
            _PANEL,
            "--importance-exact",
            "Do not round token weights to bf16, which makes bf16 Hessians exact.",
            default=False,
        ),
    ] = False
    importance_linears: Annotated[
        list[str] | None,
        value(
            _PANEL,
            "--importance-linears",
            "ROLE",
            "Weigh tokens for these linears alone, such as down_proj; may be repeated.",
            default="all",
        ),
    ] = None
