"""The file of a sweep: read, and everything in it checked by name and type.

Values are those of ``quantize``'s options, which planning checks. Paths in the file
are those beside it.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rsq_stream.errors import UsageError

from ..options.by_name import JobOption, as_kind, job_options

_TOP = {
    "model": str,
    "text": str,
    "calibration": str,
    "seeds": list,
    "settings": dict,
    "grid": dict,
    "eval": dict,
    "run": list,
}
_EVAL = {"sequence-length": (int, 2), "max-windows": (int, 1), "bos": (bool, 0)}
"""Type and least value of the options under ``[eval]``."""
_NOT_HERE = {
    "seed": "seeds = [0, 1, 2] at the top of the file says it",
    "output": "the sweep gives each run its own",
    "work-dir": "the sweep gives each run its own",
    "device": "it is an option of the sweep: --device",
    "restart": "a run is started over by removing its folder",
    "keep-work": "the work folder of a finished run is of no use",
    "evict-source": "the runs read the same source",
    "allow-device-change": "results of several kinds of device do not compare",
}
_FEW = 12
"""Names that an error may list."""
_SPEED = ("ram", "vram", "threads", "batch")
"""Decide no result, so they are no settings to compare."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What ``eval`` is told; None is its default."""

    sequence_length: int | None = None
    max_windows: int | None = None
    bos: bool = False


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Options that one table names."""

    shown: dict[str, Any]
    """As the file has them."""
    fields: dict[str, Any]
    """As the fields of ``QuantizeOptions``."""


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """What a file asks for."""

    path: Path
    model: str
    """A folder or a hub id."""
    text: Path
    settings: Chosen
    grid: tuple[tuple[Chosen, ...], ...]
    """By option of the grid, each of its values; empty without a grid."""
    runs: dict[str, Chosen]
    """The ``[[run]]`` tables by name."""
    seeds: tuple[int, ...]
    evaluation: EvalOptions


def read_sweep(path: Path) -> SweepFile:
    """Read and check the file of a sweep.

    Raises
    ------
    UsageError
        In one line: the file, the key, what was wanted there and what stands there.
    """
    content = _toml(path)
    file = _Reader(path)
    file.require_known("", content, _TOP, "a key of a sweep's file")
    for key in ("model", "text"):
        if key not in content:
            file.refuse(key, "is missing: a sweep needs a model and an evaluation text")
    for key, kind in _TOP.items():
        if key in content:
            file.require_type(key, content[key], kind)
    settings = file.chosen("settings", content.get("settings", {}))
    if "calibration" in content:
        if "calibration" in settings.fields:
            file.refuse("calibration", "stands at the top and under [settings]; once")
        settings.shown["calibration"] = content["calibration"]
        settings.fields["calibration"] = content["calibration"]
    return SweepFile(
        path=path,
        model=file.model(content["model"]),
        text=path.parent / content["text"],
        settings=settings,
        grid=file.grid(content.get("grid")),
        runs=file.runs(content.get("run", [])),
        seeds=file.seeds(content.get("seeds", [0])),
        evaluation=file.evaluation(content.get("eval", {})),
    )


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from error


def shown(value: object) -> str:
    """Write a value about as the file does."""
    return json.dumps(value, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class _Reader:
    """The checks, each refusing by the name of the file and the key."""

    path: Path

    def refuse(self, key: str, what: str) -> NoReturn:
        raise UsageError(f"{self.path}: {key} {what}")

    def require_type(self, key: str, value: object, kind: type) -> None:
        wanted: dict[type, str] = {
            str: "a string",
            list: "a list",
            dict: f"a table, [{key}]",
        }
        if key == "run":
            wanted[list] = "tables, each [[run]]"
        if type(value) is not kind or value == "":
            self.refuse(key, f"must be {wanted[kind]}, not {shown(value)}")

    def require_known(
        self, key: str, names: Iterable[str], known: Iterable[str], what: str
    ) -> None:
        known = sorted(known)
        for name in names:
            if name in known:
                continue
            hint = f"there are {', '.join(known)}"
            if len(known) > _FEW:
                hint = "rsq-stream quantize --help lists them"
            if close := difflib.get_close_matches(name, known, 1):
                hint = f"did you mean {close[0]}?"
            self.refuse(f"{key}{name}", f"is not {what}; {hint}")

    def model(self, given: str) -> str:
        """Return a folder beside the file if there is one, else a hub id."""
        folder = self.path.parent / given
        return str(folder) if folder.is_dir() else given

    def chosen(self, key: str, table: Mapping[str, Any]) -> Chosen:
        """Take a table of options of ``quantize``."""
        fields: dict[str, Any] = {}
        for name, value in table.items():
            option = self._option(key, name)
            if option.field in fields:
                self.refuse(f"{key}.{name}", "says again what the table says already")
            fields[option.field] = self._value(f"{key}.{name}", option, value)
        return Chosen(shown=dict(table), fields=fields)

    def _option(self, key: str, name: str) -> JobOption:
        if name in _NOT_HERE:
            self.refuse(f"{key}.{name}", f"has no place here: {_NOT_HERE[name]}")
        if name in _SPEED and key != "settings":
            self.refuse(
                f"{key}.{name}", "decides no result, it goes under [settings] only"
            )
        usable = job_options().keys() - _NOT_HERE.keys()
        self.require_known(f"{key}.", [name], usable, "an option of quantize")
        return job_options()[name]

    def _value(self, key: str, option: JobOption, value: object) -> Any:
        try:
            return option.taken(value)
        except TypeError:
            self.refuse(key, f"must be {option.wanted}, not {shown(value)}")

    def grid(self, table: Mapping[str, Any] | None) -> tuple[tuple[Chosen, ...], ...]:
        if table is None:
            return ()
        if not table:
            self.refuse("grid", "is empty: give options with lists, as bits = [2, 3]")
        axes: dict[str, tuple[Chosen, ...]] = {}
        for name, values in table.items():
            option, key = self._option("grid", name), f"grid.{name}"
            if option.field in axes:
                self.refuse(key, "says again what the table says already")
            if type(values) is not list or not values:
                self.refuse(key, f"must be a list of values, not {shown(values)}")
            taken = [self._value(key, option, value) for value in values]
            for value in taken:
                if taken.count(value) > 1:
                    self.refuse(key, f"holds {shown(value)} more than once")
            axes[option.field] = tuple(
                Chosen(shown={name: as_given}, fields={option.field: value})
                for as_given, value in zip(values, taken, strict=True)
            )
        return tuple(axes.values())

    def runs(self, tables: list[Any]) -> dict[str, Chosen]:
        found: dict[str, Chosen] = {}
        for number, table in enumerate(tables, 1):
            key = f"run {number}"
            if type(table) is not dict:
                self.refuse(key, f"must be a table, [[run]], not {shown(table)}")
            name = table.get("name")
            if type(name) is not str or not name.strip() or not name.isprintable():
                got = shown(name) if "name" in table else "nothing"
                self.refuse(f"{key}.name", f"must be a line of text, not {got}")
            if name in found:
                self.refuse(f"{key}.name", f"is {shown(name)}, as another run's is")
            options = {key: value for key, value in table.items() if key != "name"}
            found[name] = self.chosen(key, options)
        return found

    def seeds(self, values: list[Any]) -> tuple[int, ...]:
        distinct = len({shown(value) for value in values}) == len(values)
        if not values or not distinct or any(type(v) is not int for v in values):
            wanted = "a list of different whole numbers, such as [0, 1, 2]"
            self.refuse("seeds", f"must be {wanted}, not {shown(values)}")
        for value in values:
            if not 0 <= value < 2**62:
                self.refuse("seeds", f"must be 0 to 2**62 - 1, not {value}")
        return tuple(values)

    def evaluation(self, table: Mapping[str, Any]) -> EvalOptions:
        self.require_known("eval.", table, _EVAL, "an option of a sweep's eval")
        found = {}
        for name, value in table.items():
            kind, least = _EVAL[name]
            try:
                taken = as_kind(kind, value)
            except TypeError as error:
                self.refuse(f"eval.{name}", f"must be {error}, not {shown(value)}")
            if taken < least:
                self.refuse(f"eval.{name}", f"must be {least} or more, not {value}")
            found[name.replace("-", "_")] = taken
        return EvalOptions(**found)
