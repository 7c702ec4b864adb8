"""``quantization_config`` of a config.json: how it is written, and read back.

Linears are named by patterns that a loader matches against the names of its modules:
one for a linear of all blocks, or of those blocks that share a scheme.
"""

from collections.abc import Mapping
from typing import Any

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.checkpoint.formats._targets import HEAD_PATTERN, names_of, pattern_of
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import (
    COMPRESSED_TENSORS,
    DEFAULT_GRID,
    GRID_FORMAT,
    GROUP_SIZES,
    HEAD_LINEAR,
    Scheme,
)
from rsq_stream.errors import UnsupportedModelError
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.families.base import LINEARS
from rsq_stream.model.online_rotation import KEY, written_rotations
from rsq_stream.model.tensor_names import block_prefix

FORMAT = "pack-quantized"
_OURS = {
    "type": ("int",),
    "strategy": ("channel", "group"),
    "dynamic": (False, None),
    "actorder": (None, "weight", "static"),
}
"""What we write, or what means the same; anything else would be read wrongly."""


def quantization_config(
    architecture: Architecture, plan: QuantizationPlan
) -> dict[str, Any]:
    """Give the ``quantization_config`` of the output's config.json; empty for none.

    With a full rotation its ``quant_method`` is null, which every loader refuses: of
    one that is merely unknown, transformers warns and goes on with random weights.
    """
    found = {} if plan.method == "rotate" else _compressed(architecture, plan)
    if plan.rotates_online:
        found |= {"quant_method": None, KEY: written_rotations(plan, architecture)}
    return found


def _compressed(architecture: Architecture, plan: QuantizationPlan) -> dict[str, Any]:
    """Say how compressed-tensors finds the linears, and their schemes."""
    targets: dict[Scheme | None, list[str]] = {}
    for linear in LINEARS:
        inputs = architecture.linear_shape(linear)[1]
        blocks: dict[Scheme | None, list[int]] = {}
        for block in range(architecture.blocks):
            scheme = plan.scheme(block_prefix(block) + linear, inputs)
            blocks.setdefault(scheme, []).append(block)
        for scheme, members in blocks.items():
            some = None if len(blocks) == 1 else members
            targets.setdefault(scheme, []).append(pattern_of(linear, some))
    head = plan.scheme(HEAD_LINEAR, architecture.width)
    if len(targets) == 1 and None not in targets and head is None:
        targets = {scheme: ["Linear"] for scheme in targets}
    ignored = targets.pop(None, [])
    if head is None:
        ignored = [HEAD_LINEAR, *ignored]
    else:
        targets.setdefault(head, []).append(HEAD_PATTERN)
    if plan.grid != DEFAULT_GRID:
        return _own_format(plan.grid, targets, ignored)
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": patterns,
                "weights": _weight_arguments(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
            for number, (scheme, patterns) in enumerate(targets.items())
            if scheme is not None
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _own_format(
    grid: str, targets: Mapping[Scheme | None, list[str]], ignored: list[str]
) -> dict[str, Any]:
    """Describe a grid that no runtime reads.

    Of an unknown ``quant_method`` transformers only warns, and goes on with random
    weights; of null it says that the model is not quantized as it should be, and stops.
    """
    return {
        "quant_method": None,
        "format": GRID_FORMAT,
        "grid": grid,
        "config_groups": {
            f"group_{number}": {
                "targets": patterns,
                "weights": {
                    "num_bits": scheme.bits,
                    "group_size": None
                    if scheme.group_size == -1
                    else scheme.group_size,
                },
            }
            for number, (scheme, patterns) in enumerate(targets.items())
            if scheme is not None
        },
        "ignore": ignored,
        "load_with": "rsq_stream.load_model",
    }


def _weight_arguments(scheme: Scheme) -> dict[str, Any]:
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def schemes_of(
    config: Mapping[str, Any], blocks: int, where: str
) -> dict[str, Scheme | None] | None:
    """Give each linear's scheme by its full name, None for one that is kept.

    For a model that is not quantized there is None in all. The head is among them.

    Raises
    ------
    UnsupportedModelError
        The checkpoint is quantized in another way than this tool writes.
    """
    quantization = config.get("quantization_config")
    if quantization is None or quantization.keys() == {"quant_method", KEY}:
        return None  # in the second case it is rotated
    names = {block_prefix(b) + linear for b in range(blocks) for linear in LINEARS}
    found: dict[str, Scheme | None] = {}
    try:
        grid = _grid_of(quantization)
        for group in quantization["config_groups"].values() if grid else ():
            scheme = _scheme(group["weights"], grid)
            for target in group["targets"]:
                if scheme is not None:
                    found.update(dict.fromkeys(names_of(target, blocks), scheme))
        for target in quantization["ignore"] if found else ():
            found.update(dict.fromkeys(names_of(target, blocks), None))
    except (AttributeError, KeyError, TypeError, ValueError):
        found = {}
    if set(found) != names | {HEAD_LINEAR}:
        raise UnsupportedModelError(
            f"{where}: its quantization_config is not {FORMAT} of the linears of its"
            " blocks, as this tool writes it"
        )
    return found


def _grid_of(quantization: Mapping[str, Any]) -> str | None:
    """Give the grid of the codes; None for a format that this tool does not write."""
    if quantization["format"] == FORMAT:
        return DEFAULT_GRID
    grid: str = quantization["grid"]
    own = quantization["format"] == GRID_FORMAT and grid in GRIDS
    return grid if own and grid != DEFAULT_GRID else None


def _scheme(weights: Mapping[str, Any], grid: str | None) -> Scheme | None:
    """Read a scheme; None for one that this tool would not write."""
    integer = grid == DEFAULT_GRID
    if integer and any(weights.get(key) not in wanted for key, wanted in _OURS.items()):
        return None
    scheme = Scheme(
        int(weights["num_bits"]),
        int(weights["group_size"] or -1),
        bool(weights["symmetric"]) if integer else True,
        grid or DEFAULT_GRID,
    )
    stored = GRIDS[scheme.grid]
    sizes = GROUP_SIZES if stored.takes_groups else (-1,)
    known = scheme.bits in stored.bit_widths and scheme.group_size in sizes
    return scheme if known else None
