"""Patterns that name linears in a config.json, and the schemes that they stand for.

A loader matches patterns against the names of its modules: one for a linear of all
blocks, or of those blocks that share a scheme.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import LM_HEAD_LINEAR, Scheme
from rsq_stream.model.architecture import Architecture

_TARGET = re.compile(
    r"re:\.\*(?:layers\\\.\(\?:(?P<blocks>[\d|]+)\)\\\.)?(?P<name>.+)\$"
)
"""What ``pattern_of`` gives; patterns of a file are compared, never run."""


HEAD_PATTERN = f"re:.*{LM_HEAD_LINEAR}$"


def pattern_of(linear: str, blocks: Iterable[int] | None) -> str:
    """Return the pattern of a linear in all blocks (None) or in some."""
    name = re.escape(linear)
    if blocks is None:
        return f"re:.*{name}$"
    return rf"re:.*layers\.(?:{'|'.join(map(str, blocks))})\.{name}$"


def names_of(target: str, architecture: Architecture) -> list[str]:
    """Return the full names that a target stands for; none if it is not one of ours."""
    if target in (LM_HEAD_LINEAR, HEAD_PATTERN):
        return [LM_HEAD_LINEAR]
    every = target == "Linear"
    name, blocks = target, None
    if pattern := _TARGET.fullmatch(target):
        name = pattern["name"]
        if pattern["blocks"] is not None:
            blocks = {int(block) for block in pattern["blocks"].split("|")}
    return [
        full_name
        for full_name, (block, linear) in architecture.model_linears().items()
        if every or re.escape(linear.name) == name
        if blocks is None or block in blocks
    ]


def targets_by_scheme(
    plan: QuantizationPlan, architecture: Architecture
) -> tuple[dict[Scheme, list[str]], list[str]]:
    """Return the targets of each scheme, and those of unquantized linears."""
    by_linear: dict[str, dict[Scheme | None, list[int]]] = {}
    for full_name, (block, linear) in architecture.model_linears().items():
        scheme = plan.scheme(full_name, architecture.size(linear.inputs))
        by_linear.setdefault(linear.name, {}).setdefault(scheme, []).append(block)
    targets: dict[Scheme | None, list[str]] = {}
    for name, blocks in by_linear.items():
        for scheme, members in blocks.items():
            some = None if len(blocks) == 1 else members
            targets.setdefault(scheme, []).append(pattern_of(name, some))
    head = plan.scheme(LM_HEAD_LINEAR, architecture.width)
    if len(targets) == 1 and None not in targets and head is None:
        targets = {scheme: ["Linear"] for scheme in targets}
    ignored = targets.pop(None, [])
    if head is None:
        ignored = [LM_HEAD_LINEAR, *ignored]
    else:
        targets.setdefault(head, []).append(HEAD_PATTERN)
    quantized = {key: value for key, value in targets.items() if key is not None}
    return quantized, ignored


def schemes_by_name(
    quantization: Mapping[str, Any],
    architecture: Architecture,
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
                schemes.update(dict.fromkeys(names_of(target, architecture), scheme))
    for target in quantization["ignore"] if schemes else ():
        schemes.update(dict.fromkeys(names_of(target, architecture), None))
    return schemes
