"""``rsq-stream inspect``: what a quantized folder says of itself."""

import json
from pathlib import Path
from typing import Any

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.config.activations import ActivationScheme
from rsq_stream.errors import OutputError

from ..display.text import exact_size, facts, say, say_json, table
from ..options.common import AllLinears, Debug, Json, OutputFolder, Quiet

_MANIFEST = "rsq_stream.json"
_LARGEST_BYTES = 100_000_000
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
    manifest = read_manifest(output)
    if as_json:
        say_json(manifest)
        return
    try:
        text = described(manifest, all_linears=all_linears)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{output / _MANIFEST}: lacks what this tool writes there"
            f" ({type(error).__name__}: {error}); it is damaged or of another version"
        ) from error
    say(text)


def read_manifest(output: Path) -> dict[str, Any]:
    """Read what the run wrote about itself, within bounds.

    Raises
    ------
    OutputError
        It is missing, too large, or no JSON object.
    """
    path = output / _MANIFEST
    if not path.is_file():
        raise OutputError(
            f"{path}: missing; {output} is no finished output of rsq-stream"
            if output.is_dir()
            else f"{output}: no such folder"
        )
    if path.stat().st_size > _LARGEST_BYTES:
        raise OutputError(f"{path}: larger than any file of its kind")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise OutputError(f"{path}: not valid JSON ({error}); it is damaged") from error
    if not isinstance(content, dict):
        raise OutputError(f"{path}: a JSON object was expected; it is damaged")
    return content


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
    scheme = ActivationScheme.from_fields(plan)
    if not scheme.rounds_activations:
        return {}
    return {"activations": scheme.activations_text()}
