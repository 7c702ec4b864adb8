"""How sizes, times and tables are written."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer


def size(size_bytes: int) -> str:
    """Write a size: ``1.50 GiB``, ``12.0 MiB``, ``7 bytes``."""
    for power, unit, digits in ((3, "GiB", 2), (2, "MiB", 1), (1, "KiB", 1)):
        if size_bytes >= 1024**power:
            return f"{size_bytes / 1024**power:.{digits}f} {unit}"
    return f"{size_bytes} bytes"


def exact_size(size_bytes: int) -> str:
    """Write a size to the byte, and readably: ``1,048,576 bytes (1.0 MiB)``."""
    return f"{size_bytes:,} bytes ({size(size_bytes)})"


def duration(seconds: float) -> str:
    """Write a time roughly: ``12 s``, ``5 m``, ``3 h 20 m``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} m"
    return f"{minutes // 60} h {minutes % 60} m"


def linear_kind(name: str) -> str:
    """Return what a linear is: ``q_proj`` of ``model.layers.3.self_attn.q_proj``."""
    return name.rpartition(".")[2]


def facts(rows: Mapping[str, str]) -> str:
    """Write names and values side by side."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write aligned columns, the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def say(text: str) -> None:
    """Write a result to stdout."""
    typer.echo(text)


def say_json(content: Mapping[str, Any]) -> None:
    """Write a result to stdout as one JSON object."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def say_aside(text: str) -> None:
    """Write lines to stderr: stdout is for what was asked for."""
    typer.echo(text, err=True)


def remark(kind: str, text: str) -> None:
    """Write one line to stderr: ``notice: ...`` or ``warning: ...``."""
    typer.echo(f"{kind}: {' '.join(text.splitlines())}", err=True)
