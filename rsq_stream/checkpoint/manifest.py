"""What an output says of itself: its manifest, and the seal that answers for it.

The manifest names every other file of the folder by its sha256; the seal names the
manifest. A folder that has its seal is complete.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.activations import NOTHING, ActivationRounding
from rsq_stream.errors import OutputError
from rsq_stream.storage import atomic

MANIFEST = "rsq_stream.json"
SEAL = "rsq_stream.sha256"
_LARGEST_BYTES = 500_000_000
"""Far above the manifest of any model there is; what is larger is not read."""


def write_manifest(folder: Path, content: bytes) -> None:
    """Write a manifest, and after it the seal: from then on the output is complete."""
    atomic.write_file(folder / MANIFEST, content)
    atomic.write_file(folder / SEAL, seal_of(content))


def seal_of(content: bytes) -> bytes:
    """Return the seal of a manifest, as ``sha256sum --check`` reads it."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an output, within bounds.

    Raises
    ------
    OutputError
        It is missing, too large, or no JSON object.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise OutputError(
            f"{path}: missing; {folder} is no finished output of rsq-stream"
            if folder.is_dir()
            else f"{folder}: no such folder"
        )
    return parsed_manifest(path, manifest_bytes(path))


def manifest_bytes(path: Path) -> bytes:
    """Read a manifest's file, within bounds.

    Raises
    ------
    OutputError
        It is larger than any manifest.
    """
    if path.stat().st_size > _LARGEST_BYTES:
        raise OutputError(f"{path}: larger than any file of its kind")
    return path.read_bytes()


def parsed_manifest(path: Path, content: bytes) -> dict[str, Any]:
    """Parse what a manifest's file holds.

    Raises
    ------
    OutputError
        It is no JSON object.
    """
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise OutputError(f"{path}: not valid JSON ({error}); it is damaged") from error
    if not isinstance(manifest, dict):
        raise OutputError(f"{path}: a JSON object was expected; it is damaged")
    return manifest


def served_rounding(checkpoint: Checkpoint) -> ActivationRounding:
    """Return the activations that a folder's plan rounds; a source's plan, none.

    Raises
    ------
    OutputError
        The folder's manifest is damaged.
    """
    files = checkpoint.files
    if not files.exists(MANIFEST):
        return NOTHING
    path = files.path(MANIFEST)
    content = manifest_bytes(path)
    try:
        plan: Mapping[str, Any] = dict(json.loads(content)["plan"])
        return ActivationRounding.from_fields(plan)
    except (LookupError, TypeError, ValueError) as error:
        raise OutputError(
            f"{path}: does not say how activations are served"
            f" ({type(error).__name__}: {error}); it is damaged or of another version"
        ) from error
