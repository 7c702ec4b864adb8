"""The lists in pyproject.toml against the tree, and what an import brings in."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import rsq_stream
from tests.support.cli_runs import run_program

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
NOT_INSTALLED = {"tests", "benchmarks"}
HEAVY = ("torch", "transformers", "numba", "zarr", "pyarrow")


def _packages_on_disk() -> dict[str, Path]:
    """Name to folder, for each folder of the tree that holds Python."""
    names = {folder: name for name, folder in SETUPTOOLS["package-dir"].items()}
    packages = {}
    for top in (path for path in ROOT.iterdir() if path.name not in NOT_INSTALLED):
        if not (top / "__init__.py").exists() and top.name not in names:
            continue
        for folder in {file.parent for file in top.rglob("*.py")}:
            parts = folder.relative_to(top).parts
            packages[".".join((names.get(top.name, top.name), *parts))] = folder
    return packages


def test_packages_are_those_of_the_tree() -> None:
    assert set(_packages_on_disk()) == set(SETUPTOOLS["packages"])


def test_packages_have_an_init() -> None:
    # Without one, the wheel is fine and the editable install does not find it.
    folders = _packages_on_disk().values()
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == []


def test_package_data_is_that_of_the_tree() -> None:
    on_disk, listed = set(), set()
    for name, folder in _packages_on_disk().items():
        for pattern in SETUPTOOLS["package-data"].get(name, []):
            found = {str(file.relative_to(ROOT)) for file in folder.glob(pattern)}
            assert found, f"package-data of {name}: {pattern!r} matches no file"
            listed |= found
        on_disk |= {
            str(file.relative_to(ROOT))
            for file in folder.rglob("*")
            if file.is_file() and file.suffix != ".py"
            if "__pycache__" not in file.parts
        }
    assert on_disk == listed


@pytest.mark.parametrize("name", ["cli", "kernels"])
def test_generic_names_are_not_importable(name: str) -> None:
    # `kernels` is also a package on PyPI, which transformers imports if it is there.
    spec = find_spec(name)
    assert spec is None or not Path(str(spec.origin)).is_relative_to(ROOT / name)


def test_changelog_begins_with_this_version() -> None:
    headings = [
        line.removeprefix("## ")
        for line in (ROOT / "CHANGELOG.md").read_text().splitlines()
        if line.startswith("## ")
    ]
    assert headings[0].split()[0] == rsq_stream.__version__


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from rsq_stream.cli.main import main\n"
        "sys.argv = ['rsq-stream', '--help']\n"
        "try:\n"
        "    code = main()\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "sys.exit(code or (f'imported: {loaded}' if loaded else 0))\n"
    )
    done = run_program(program)
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout
