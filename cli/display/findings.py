"""What in a finished run deserves a line: odd linears, in plain words."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.events import LinearRecord

from .text import linear_kind

FAR_ABOVE = 5.0
"""A linear stands out above this many times the median of its kind."""
_NAMED = 4


def far_above_peers(
    records: Sequence[LinearRecord], factor: float = FAR_ABOVE
) -> list[tuple[LinearRecord, float]]:
    """Return the linears that lost far more than their kind did, with the median.

    A kind is the last part of the name: all q_proj of all blocks are peers.
    Errors of 0.01, 0.01 and 0.06 in three q_proj give the third one.
    """
    kinds: dict[str, list[float]] = defaultdict(list)
    for made in records:
        kinds[linear_kind(made.name)].append(made.relative_error)
    medians = {kind: statistics.median(errors) for kind, errors in kinds.items()}
    return [
        (made, medians[linear_kind(made.name)])
        for made in records
        if made.relative_error > factor * medians[linear_kind(made.name)]
    ]


def warnings_of(records: Sequence[LinearRecord]) -> list[str]:
    """Return one line that names the linears that stand out, the farthest first."""
    found = far_above_peers(records)
    if not found:
        return []
    found.sort(key=lambda pair: pair[1] / max(pair[0].relative_error, 1e-30))
    named = [
        f"{made.name} {made.relative_error:.4f} (median {median:.4f})"
        for made, median in found[:_NAMED]
    ]
    if len(found) > _NAMED:
        named.append(f"{len(found) - _NAMED} more")
    line = (
        f"{len(found)} of {len(records)} linears have a relative error more than"
        f" {FAR_ABOVE:g} times the median of their kind: {', '.join(named)}; more"
        " --bits or a smaller --group-size would lower it"
    )
    return [line]


def notices_of(plan: QuantizationPlan, records: Sequence[LinearRecord]) -> list[str]:
    """Return the lines that a user of the output should know."""
    lines = []
    kept = sum(made.kept_rounding for made in records)
    damped = sum(made.damping_attempts > 1 for made in records)
    if kept:
        lines.append(
            f"{kept} of {len(records)} linears kept their rounded codes: the solver"
            " found nothing better"
        )
    if damped:
        lines.append(
            f"{damped} of {len(records)} linears needed more damping than"
            f" {plan.damping:g}: their inputs are nearly dependent"
        )
    lines += FORMATS[plan.output_format].notices(plan)
    if plan.rounds_activations:
        lines.append(
            f"made for rounded activations ({plan.activations_text()}): eval simulates"
            " them, no loader applies them by itself"
        )
    return lines
