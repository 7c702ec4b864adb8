"""A registry: names by reading a folder, modules when an entry is looked up."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsq_stream.errors import UsageError
from rsq_stream.registry import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[int]]:
    """Two entries, and two modules that are none."""
    folder = tmp_path / "made_up_entries"
    folder.mkdir()
    for module, text in (
        ("__init__", ""),
        ("base", "raise AssertionError"),
        ("_shared", "raise AssertionError"),
        ("second", "ENTRY = 2"),
        ("a_first", "ENTRY = 1"),
    ):
        (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("made_up_entries", "ENTRY", option="entry")
    for name in [name for name in sys.modules if name.startswith("made_up_entries")]:
        del sys.modules[name]


def test_names_are_listed_without_an_import(package: Registry[int]) -> None:
    assert list(package) == ["a-first", "second"]
    assert len(package) == 2
    assert "second" in package
    assert "base" not in package
    assert [name for name in sys.modules if name.startswith("made_up_entries.")] == []


def test_an_entry_is_that_of_its_module(package: Registry[int]) -> None:
    assert package["a-first"] == 1
    assert dict(package) == {"a-first": 1, "second": 2}


def test_an_unknown_name_is_refused_with_those_that_are_there(
    package: Registry[int],
) -> None:
    message = r"^--entry must be one of a-first, second, not third$"
    with pytest.raises(UsageError, match=message):
        package["third"]


def test_an_entry_may_be_added_and_removed(package: Registry[int]) -> None:
    package.add("b", 3)
    assert list(package) == ["a-first", "b", "second"]
    assert package["b"] == 3
    with pytest.raises(UsageError, match=r"^--entry b: there is one of that name$"):
        package.add("b", 4)
    package.remove("b")
    assert "b" not in package
