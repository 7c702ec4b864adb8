"""The README.md of an output folder: what it is and how to load it."""

import statistics

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.events import LinearRecord
from rsq_stream.model.architecture import Architecture

_METHODS = {
    "rsq": "RSQ (rotate, weigh tokens by the attention they receive, GPTQ)",
    "quarot": "GPTQ on rotated weights (QuaRot, weights only)",
    "gptq": "GPTQ",
    "rtn": "rounding to nearest",
    "rotate": "none; the weights are rotated and otherwise as they were",
}


def model_card(
    plan: QuantizationPlan,
    architecture: Architecture,
    records: list[LinearRecord],
    bits_per_weight: float,
) -> str:
    """Write the card; nothing in it depends on when or where the run happened."""
    group = (
        "one scale a row" if plan.group_size == -1 else f"groups of {plan.group_size}"
    )
    grid = GRIDS[plan.grid].in_words(symmetric=plan.symmetric)
    loader = FORMATS[plan.output_format].loader(plan)
    fallbacks = sorted(
        {
            made.name.split(".", 3)[-1]
            for made in records
            if made.group_size == -1 != plan.group_size
        }
    )
    bits = sorted({made.bits for made in records})
    online = plan.rotates_online
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [{', '.join(('quantized', *loader.tags, 'rsq-stream'))}]",
        "---",
        f"# {architecture.family.causal_class},"
        + (f" {_span(bits)}-bit" if records else " rotated"),
        "",
        f"{'Quantized' if records else 'Made'} by rsq-stream.",
        "",
        f"- Method: {_METHODS[plan.method]}",
        *([f"- Codes: {_span(bits)} bits, {grid}, {group}"] if records else []),
        f"- Size: {bits_per_weight:.2f} bits per weight over the whole model",
    ]
    if fallbacks:
        lines.append(f"- One scale a row instead: {', '.join(fallbacks)}")
    if plan.residual_rotation != "none":
        lines.append(
            f"- Rotation: {plan.residual_rotation} on the residual stream,"
            f" {plan.value_rotation} in each value head, folded into the weights;"
            + ("" if online else " nothing is left to do at inference")
        )
    if online:
        lines[-1] += (
            f" **done at inference**: {plan.heads_rotation} across the heads of"
            f" o_proj's input, {plan.mlp_rotation} on down_proj's"
        )
    if plan.needs_calibration:
        lines.append(
            f"- Calibration: {plan.samples} windows of {plan.sequence_length} tokens"
            f" ({plan.calibration}), {plan.expand} rolled copies each; token"
            f" importance: {plan.importance}"
        )
        if plan.propagate:
            lines.append(
                f"- Error propagation: targets make up for {plan.propagate:g} of the"
                " error of earlier layers"
            )
    if plan.rounds_activations:
        lines.append(
            f"- Made for rounded activations ({plan.activations_text()}), which no"
            " loader applies by itself; `rsq-stream eval` simulates them"
        )
    errors = [made.relative_error for made in records]
    if errors:
        lines.append(
            f"- Relative output error of the linears: median"
            f" {statistics.median(errors):.4f}, worst {max(errors):.4f}"
        )
    lines += [
        "",
        loader.introduction,
        "",
        "```python",
        loader.imports,
        f"model = {loader.call('this folder')}",
        "```",
        "",
        "Plan, per-linear errors and checksums are in `rsq_stream.json`.",
        "",
    ]
    return "\n".join(lines)


def _span(bits: list[int]) -> str:
    """Write the least and the most of some bits: 3, or 2 to 4."""
    return f"{bits[0]}" if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"
