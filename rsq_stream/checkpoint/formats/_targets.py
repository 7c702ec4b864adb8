"""Patterns that name linears in a config.json."""

import re
from collections.abc import Iterable

from rsq_stream.config.schemes import (
    HEAD_LINEAR,
)
from rsq_stream.model.families.base import LINEARS
from rsq_stream.model.tensor_names import block_prefix

_TARGET = re.compile(
    r"re:\.\*(?:layers\\\.\(\?:(?P<blocks>[\d|]+)\)\\\.)?(?P<name>.+)\$"
)
"""What ``pattern_of`` gives; patterns of a file are compared, never run."""


HEAD_PATTERN = f"re:.*{HEAD_LINEAR}$"


def pattern_of(linear: str, blocks: Iterable[int] | None) -> str:
    """Give the pattern of a linear in all blocks (None) or in some."""
    name = re.escape(linear)
    if blocks is None:
        return f"re:.*{name}$"
    return rf"re:.*layers\.(?:{'|'.join(map(str, blocks))})\.{name}$"


def names_of(target: str, blocks: int) -> list[str]:
    """Give the full names that a target stands for; none if it is not one of ours."""
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
