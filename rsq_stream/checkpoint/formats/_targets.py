"""Patterns that name linears in a config.json, and the schemes that they stand for.

A loader matches patterns against the names of its modules: one for a linear of all
blocks, or of those blocks that share a scheme.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import (
    HEAD_LINEAR,
    Scheme,
)
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.families.base import LINEARS
from rsq_stream.model.tensor_names import block_prefix

_TARGET = re.compile(
    r"re:\.\*(?:layers\\\.\(\?:(?P<blocks>[\d|]+)\)\\\.)?(?P<name>.+)\$"
)
"""What ``pattern_of`` gives; patterns of a file are compared, never run."""


HEAD_PATTERN = f"re:.*{HEAD_LINEAR}$"


def pattern_of(linear: str, blocks: Iterable[int] | None) -> str:
    """Return the pattern of a linear in all blocks (None) or in some."""
    name = re.escape(linear)
    if blocks is None:
        return f"re:.*{name}$"
    return rf"re:.*layers\.(?:{'|'.join(map(str, blocks))})\.{name}$"


def names_of(target: str, blocks: int) -> list[str]:
    """Return the full names that a target stands for; none if it is not one of ours."""
    if target in (HEAD_LINEAR, HEAD_PATTERN):
        return [HEAD_LINEAR]
    wanted: Iterable[int] = range(blocks)
    linears = [target]
    if target == "Linear":
        linears = [re.escape(linear) for linear in LINEARS]
    elif found := _TARGET.fullmatch(target):
        linears = [found["name"]]
        if found["blocks"] is not None:
            wanted = [int(block) for block in found["blocks"].split("|")]
    return [
        block_prefix(block) + linear
        for linear in LINEARS
        if re.escape(linear) in linears
        for block in wanted
    ]


def targets_by_scheme(
    plan: QuantizationPlan, architecture: Architecture
) -> tuple[dict[Scheme, list[str]], list[str]]:
    """Return the targets of each scheme, and those of unquantized linears."""
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
    quantized = {key: value for key, value in targets.items() if key is not None}
    return quantized, ignored


def schemes_by_name(
    quantization: Mapping[str, Any],
    blocks: int,
    scheme_of: Callable[[Mapping[str, Any]], Scheme | None],
) -> dict[str, Scheme | None]:
    """Undo ``targets_by_scheme``: each linear's scheme by its full name.

    ``scheme_of`` reads a group's ``weights``; linears are absent where it returns None.
    """
    schemes: dict[str, Scheme | None] = {}
    for group in quantization["config_groups"].values():
        scheme = scheme_of(group["weights"])
        for target in group["targets"]:
            if scheme is not None:
                schemes.update(dict.fromkeys(names_of(target, blocks), scheme))
    for target in quantization["ignore"] if schemes else ():
        schemes.update(dict.fromkeys(names_of(target, blocks), None))
    return schemes
