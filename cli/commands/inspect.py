"""``rsq-stream inspect``: what a quantized folder says of itself."""

from typing import Any

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.config.activations import ActivationRounding
from rsq_stream.errors import OutputError

from ..display.text import exact_size, facts, say, say_json, table
from ..options.common import AllLinears, Debug, Json, OutputFolder, Quiet

_WORST = 10


def inspect(
    output: OutputFolder,
    *,
    all_linears: AllLinears = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show bits per weight, files and per-linear errors of a quantized folder."""
    del quiet, debug
    from rsq_stream.checkpoint.manifest import MANIFEST, read_manifest

    manifest = read_manifest(output)
    if as_json:
        say_json(manifest)
        return
    try:
        text = described(manifest, all_linears=all_linears)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{output / MANIFEST}: lacks what this tool writes there"
            f" ({type(error).__name__}: {error}); it is damaged or of another version"
        ) from error
    say(text)


def described(manifest: dict[str, Any], *, all_linears: bool) -> str:
    """Write the manifest out for a reader."""
    plan, linears = manifest["plan"], manifest["linears"]
    sizes = {name: int(file["bytes"]) for name, file in manifest["files"].items()}
    grid = GRIDS[plan["grid"]].in_words(symmetric=plan["symmetric"])
    group = "one scale a row" if plan["group_size"] == -1 else str(plan["group_size"])
    online = [plan[name] for name in ("heads_rotation", "mlp_rotation")]
    rows = {
        "method": str(plan["method"]),
        "codes": f"{plan['bits']} bits, {grid}",
        "group size": group,
        "rotation": f"{plan['residual_rotation']}, {plan['value_rotation']}",
        **({"at inference": ", ".join(online)} if online != ["none"] * 2 else {}),
        "calibration": f"{plan['calibration']}: {plan['samples']} windows of"
        f" {plan['sequence_length']} tokens",
        **_activations(plan),
        "format": str(plan["output_format"]),
        "bits per weight": f"{float(manifest['bits_per_weight']):.3f}",
        "size": exact_size(sum(sizes.values())),
        "versions": ", ".join(f"{n} {v}" for n, v in manifest["versions"].items()),
    }
    files = [(name, f"{size:,}") for name, size in sizes.items()]
    ordered = linears
    if not all_linears:
        ordered = sorted(linears, key=lambda made: -float(made["relative_error"]))
        ordered = ordered[:_WORST]
    lines = [
        (
            str(made["name"]),
            str(made["bits"]),
            str(made["group_size"]),
            f"{float(made['relative_error']):.5f}",
            f"{float(made['rounding_error']):.5f}",
            str(made["dead_inputs"]),
        )
        for made in ordered
    ]
    title = f"linear (all {len(linears)})" if all_linears else "linear (the worst)"
    head = (title, "bits", "group", "error", "by rounding", "dead inputs")
    parts = (facts(rows), table(("file", "bytes"), files), table(head, lines))
    return "\n\n".join(parts)


def _activations(plan: dict[str, Any]) -> dict[str, str]:
    """Say which activations the run saw rounded; nothing where none was."""
    scheme = ActivationRounding.from_fields(plan)
    if not scheme.rounds_activations:
        return {}
    return {"activations": scheme.activations_text()}
