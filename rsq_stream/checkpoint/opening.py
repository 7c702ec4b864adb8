"""Open a model by its name: a folder, or an id on the Hugging Face hub."""

from os import PathLike
from typing import Any

from rsq_stream.checkpoint.files import SIDE_FILES, open_files
from rsq_stream.checkpoint.shards import Checkpoint

Model = str | PathLike[str]
"""A folder, or an id on the Hugging Face hub."""


def open_checkpoint(model: Model, revision: str | None = None) -> Checkpoint:
    """Open a folder or hub id by its headers.

    Raises
    ------
    CheckpointError
        There is no such model, or its files are damaged.
    """
    return Checkpoint(open_files(str(model), revision))


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """Load a checkpoint's own tokenizer, by transformers.

    The small files of a hub id are fetched for it.
    """
    from rsq_stream.calibration.tokenizer import load_tokenizer

    for name in SIDE_FILES:
        checkpoint.files.exists(name)  # of a hub id, this fetches the file
    return load_tokenizer(checkpoint.files.path("config.json").parent)
