"""Calibration text: named data sets of the hub at a pinned revision, or a file."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from rsq_stream.errors import CalibrationError

_JOIN = "\n\n"
_LARGEST_TEXT_CHARACTERS = 50_000_000
"""Of a large data set, as many characters (in random order of the documents) are
taken: 12 million tokens and more."""
_UNREADABLE = (
    *(OSError, EOFError, zlib.error),
    *(ValueError, KeyError, TypeError, RecursionError),
)
"""What a file that is not what its ending says makes its reader raise."""


@dataclass(frozen=True)
class DataSet:
    """A public data set: one file of it, at a pinned revision."""

    repo: str
    file: str
    revision: str
    shuffled: bool
    """Documents are taken in random order, not as one text."""


DATA_SETS = {
    "wikitext2": DataSet(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        shuffled=False,
    ),
    "c4": DataSet(
        "allenai/c4",
        "en/c4-train.00000-of-01024.json.gz",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        shuffled=True,
    ),
}


def read_text(calibration: str, seed: int, option: str = "--calibration") -> str:
    """Return the text of a named data set or of a .txt, .jsonl or .parquet file.

    Errors name the file as the value of ``option``.

    Raises
    ------
    CalibrationError
        No such name or file, or a file that is not what its ending says.
    """
    if calibration in DATA_SETS:
        data_set = DATA_SETS[calibration]
        path = _fetched(calibration, data_set)
        if data_set.shuffled:
            return _shuffled(path, seed, option)
        return _JOIN.join(_documents(path, option))
    path = Path(calibration)
    if not path.is_file():
        names = ", ".join(DATA_SETS)
        raise CalibrationError(
            f"{option} {calibration}: no such file, and not one of {names}"
        )
    return _JOIN.join(_documents(path, option))


def _fetched(name: str, data_set: DataSet) -> Path:
    try:
        return Path(
            hf_hub_download(
                data_set.repo,
                data_set.file,
                revision=data_set.revision,
                repo_type="dataset",
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CalibrationError(
            f"--calibration {name}: the hub cannot be reached and the data set is not"
            " in its cache; give a text with --calibration FILE"
        ) from error


def _documents(path: Path, option: str) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            # Only here: planning without a text need not wait for it.
            import pyarrow.parquet as parquet

            column = parquet.read_table(path, columns=["text"]).column("text")
            yield from (_text(value) for value in column.to_pylist())
        elif path.suffix in (".jsonl", ".json", ".gz"):
            yield from _json_lines(path)
        elif path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        else:
            raise CalibrationError(
                f"{option} {path}: must end in .txt, .jsonl or .parquet"
            )
    except _UNREADABLE as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(
            f"{option} {path}: cannot be read as {path.suffix} with a 'text' in"
            f" each row ({str(error).splitlines()[0]})"
        ) from error


def _json_lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield _text(json.loads(line)["text"])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("'text' is not a string")
    return value


def _shuffled(path: Path, seed: int, option: str) -> str:
    """Join documents in random order until there is enough text.

    They are read twice, as all of them would take twenty times that text.
    """
    lengths = [len(document) for document in _documents(path, option)]
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    wanted, length = set(), 0
    for index in order:
        wanted.add(index)
        length += lengths[index]
        if length > _LARGEST_TEXT_CHARACTERS:
            break
    kept = {
        index: document
        for index, document in enumerate(_documents(path, option))
        if index in wanted
    }
    return _JOIN.join(kept[index] for index in order[: len(wanted)])
