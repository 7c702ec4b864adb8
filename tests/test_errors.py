"""The tree in the docstring is the tree of the classes."""

import builtins
import inspect
import re

import pytest

from rsq_stream import errors

LINE = re.compile(
    r"^    (?P<indent>[│ ]*)(?P<branch>[├└]── )?(?P<name>[A-Z]\w+)"
    r"(?: \((?P<also>\w+)\))?(?:  +(?P<means>\S.*))?$"
)
CLASSES: dict[str, type[Exception]] = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, Exception)
}


def drawn_tree() -> dict[str, tuple[list[str], str]]:
    """Name -> (bases, meaning), from the drawing."""
    assert errors.__doc__ is not None
    drawing = errors.__doc__.split("::\n\n", 1)[1].split("\n\n", 1)[0]
    tree: dict[str, tuple[list[str], str]] = {}
    above: list[str] = []
    for line in drawing.splitlines():
        found = LINE.match(line)
        assert found, f"not a line of the tree: {line!r}"
        depth = len(found["indent"]) // 4 + bool(found["branch"])
        del above[depth:]
        assert len(above) == depth, f"hangs in the air: {line!r}"
        parent = above[-1] if above else "Exception"
        bases = [parent, found["also"]] if found["also"] else [parent]
        tree[found["name"]] = bases, found["means"] or ""
        above.append(found["name"])
    return tree


def test_drawing_is_the_tree():
    drawn = {name: bases for name, (bases, _) in drawn_tree().items()}
    assert drawn == {
        name: [base.__name__ for base in found.__bases__]
        for name, found in CLASSES.items()
    }


def test_drawing_says_what_each_is():
    assert [name for name, (_, means) in drawn_tree().items() if not means] == [
        "RsqError"
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_each_is_caught_by_the_base_and_by_what_it_refines(name):
    error = CLASSES[name]("what, where, wanted, got")
    assert str(error).startswith("what, where, wanted, got")
    assert isinstance(error, errors.RsqError)
    refined = [base for base in type(error).__mro__ if base.__module__ == "builtins"]
    if name != "RsqError":
        assert refined[0] not in (Exception, BaseException, object)
        assert hasattr(builtins, refined[0].__name__)


@pytest.mark.parametrize("name", CLASSES)
def test_each_is_one_sentence(name):
    text = inspect.getdoc(CLASSES[name])
    assert text
    assert "\n" not in text
    assert text.endswith(".")
