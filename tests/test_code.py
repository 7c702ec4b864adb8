"""How the code is written: names at calls, files and folders of a size to read."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("rsq_stream", "cli")
MOST_BY_POSITION = 4
MAX_LINES = 300
MAX_FILES = 16
DRIVERS = ("driver", "nvrtc")
"""CUDA's own interfaces, which take all by position."""


@cache
def trees(room: str) -> dict[str, ast.Module]:
    """Each file's syntax tree by its path."""
    return {
        str(file.relative_to(ROOT)): ast.parse(file.read_text())
        for file in sorted((ROOT / room).rglob("*.py"))
    }


@cache
def compiled() -> frozenset[str]:
    """Names of the functions that numba compiles: there, position is the custom."""
    return frozenset(
        node.name
        for tree in trees("rsq_stream").values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        if any("njit" in ast.unparse(part) for part in node.decorator_list)
    )


def positional(call: ast.Call) -> int:
    """Arguments by position; a starred tuple counts as what is in it."""
    return sum(
        len(part.value.elts)
        if isinstance(part, ast.Starred)
        and isinstance(part.value, ast.Tuple | ast.List)
        else 1
        for part in call.args
    )


def exempt(call: ast.Call) -> bool:
    match call.func:
        case ast.Name(name):
            return name == "launch" or name in compiled()
        case ast.Attribute(ast.Name(owner)):
            return owner in DRIVERS
    return False


def long_calls(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or exempt(node):
            continue
        if positional(node) > MOST_BY_POSITION:
            yield node


def wide_dataclasses(tree: ast.Module) -> Iterator[ast.ClassDef]:
    """Dataclasses of many fields that may be filled by position."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        decorators = [ast.unparse(part) for part in node.decorator_list]
        fields = [
            part
            for part in node.body
            if isinstance(part, ast.AnnAssign)
            if not ast.unparse(part.annotation).startswith("ClassVar")
        ]
        if len(fields) > MOST_BY_POSITION and any(
            "dataclass" in part and "kw_only=True" not in part for part in decorators
        ):
            yield node


@pytest.mark.parametrize("room", ROOMS)
def test_calls_name_what_they_pass(room: str) -> None:
    calls = [
        f"{file}:{call.lineno} {ast.unparse(call.func)}"
        for file, tree in trees(room).items()
        for call in long_calls(tree)
    ]
    assert calls == []


@pytest.mark.parametrize("room", ROOMS)
def test_wide_dataclasses_are_keyword_only(room: str) -> None:
    classes = [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in trees(room).items()
        for node in wide_dataclasses(tree)
    ]
    assert classes == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("f(1, 2, 3, 4)", 0),
        ("f(1, 2, 3, 4, 5)", 1),
        ("f(1, 2, *(3, 4, 5))", 1),
        ("f(1, *rest, last=5)", 0),
        ("shape.add(1, 2, 3, 4, 5)", 1),
        ("nearest_codes(1, 2, 3, 4, 5)", 0),
        ("launch(1, 2, 3, 4, 5)", 0),
        ("driver.cuLaunchKernel(1, 2, 3, 4, 5)", 0),
    ],
)
def test_what_counts_as_a_long_call(code: str, count: int) -> None:
    assert len([*long_calls(ast.parse(code))]) == count


@pytest.mark.parametrize(
    ("head", "count"),
    [
        ("@dataclass\nclass C:", 1),
        ("@dataclasses.dataclass(frozen=True)\nclass C:", 1),
        ("@dataclass(kw_only=True)\nclass C:", 0),
        ("class C(NamedTuple):", 0),
    ],
)
def test_what_counts_as_a_wide_dataclass(head: str, count: int) -> None:
    fields = "".join(f"\n    {name}: int" for name in "abcde")
    assert len([*wide_dataclasses(ast.parse(head + fields))]) == count
    assert not [*wide_dataclasses(ast.parse(head + fields.replace("e: int", "f = 1")))]


@pytest.mark.parametrize("room", ROOMS)
def test_files_are_short(room: str) -> None:
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for file in (ROOT / room).rglob("*.py")
    }
    assert {file: n for file, n in lines.items() if n > MAX_LINES} == {}


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_folders_are_small(room: str) -> None:
    files: dict[str, int] = {}
    for file in (ROOT / room).rglob("*.py"):
        folder = str(file.parent.relative_to(ROOT))
        files[folder] = files.get(folder, 0) + 1
    assert {folder: n for folder, n in files.items() if n > MAX_FILES} == {}
