"""Entries that each have a module of their own: families, grids, strategies, formats.

A registry is a package with one module an entry. Adding an entry is adding a file;
nothing else names it. ``base`` and modules that begin with an underscore hold what the
entries share.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TypeVar

from rsq_stream.errors import UsageError, one_of

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """The entries of one package, by the names of its modules.

    Listing names reads the folder and imports nothing, so that the command line can
    show them before torch is loaded; the module of an entry is imported when the entry
    is looked up. ``GRIDS["nf"]`` is ``GRID`` of ``rsq_stream/algorithm/grids/nf.py``.
    """

    def __init__(
        self, package: str, attribute: str, *, option: str, dashes: bool = True
    ) -> None:
        """Describe a package whose modules each define ``attribute``.

        With ``dashes`` the module ``first_n`` is the entry ``first-n``. ``option`` is
        what errors name.
        """
        self._package = package
        self._attribute = attribute
        self._option = option
        self._dashes = dashes
        self._added: dict[str, Entry] = {}

    @cached_property
    def _modules(self) -> dict[str, str]:
        """The module of each entry by the entry's name, in alphabetical order."""
        folder = importlib.import_module(self._package).__path__
        modules = sorted(info.name for info in pkgutil.iter_modules(folder))
        return {
            module.replace("_", "-") if self._dashes else module: module
            for module in modules
            if module != "base" and not module.startswith("_")
        }

    def __getitem__(self, name: str) -> Entry:
        """Return an entry, importing its module if need be.

        Raises
        ------
        UsageError
            There is no entry of that name; the message lists those that there are.
        """
        if name in self._added:
            return self._added[name]
        if name not in self._modules:
            raise UsageError(
                f"--{self._option} must be {one_of(tuple(self))}, not {name}"
            )
        module = importlib.import_module(f"{self._package}.{self._modules[name]}")
        entry: Entry = getattr(module, self._attribute)
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._modules, *self._added}))

    def __len__(self) -> int:
        return len({*self._modules, *self._added})

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._added

    def add(self, name: str, entry: Entry) -> None:
        """Add an entry that has no module in the package: one of a test, or a user's.

        Raises
        ------
        UsageError
            The name is taken.
        """
        if name in self:
            raise UsageError(f"--{self._option} {name}: there is one of that name")
        self._added[name] = entry

    def remove(self, name: str) -> None:
        """Remove an entry that ``add`` added."""
        del self._added[name]
