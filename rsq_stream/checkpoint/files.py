"""Where a checkpoint's files come from: a folder, or the Hugging Face hub.

Hub files are fetched one by one when something needs them; shards' headers are
read by range request, so that a plan costs kilobytes.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rsq_stream.errors import CheckpointError, UsageError
from rsq_stream.storage import atomic

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is carried over from the source as it is, where it is there."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LARGEST_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""


@dataclass(frozen=True)
class Stamp:
    """What tells without reading it that a file is still the same."""

    text: str
    sha256: str | None
    """Where somebody answers for it: the hub, for its large files."""


@runtime_checkable
class Files(Protocol):
    """A checkpoint's files by name."""

    where: str
    """How errors name the place."""

    def exists(self, name: str) -> bool:
        """Whether the checkpoint has such a file."""
        ...

    def path(self, name: str) -> Path:
        """Return a local path of the file, fetching it if need be."""
        ...

    def header(self, name: str) -> tuple[bytes, int]:
        """Return a shard's header as JSON and how many bytes of data follow it."""
        ...

    def stamp(self, name: str) -> Stamp:
        """Return what identifies a file, without fetching or reading it."""
        ...


class FolderFiles:
    """Files of a local folder."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder = folder

    def exists(self, name: str) -> bool:
        """Whether the folder has such a file."""
        return (self._folder / name).is_file()

    def path(self, name: str) -> Path:
        """Return the file's path."""
        path = self._folder / name
        if not path.is_file():
            raise CheckpointError(f"{self.where}: {name} is missing")
        return path

    def header(self, name: str) -> tuple[bytes, int]:
        """Read a shard's header."""
        header, start, file_bytes = read_header(self.path(name), self.where)
        return header, file_bytes - start

    def stamp(self, name: str) -> Stamp:
        """Return size and times; ``ctime`` changes whenever the content may have."""
        found = self.path(name).stat()
        text = f"{found.st_size} bytes of {found.st_mtime_ns}/{found.st_ctime_ns} ns"
        return Stamp(text, None)


def hub_cache() -> Path:
    """Return the folder that hub files are fetched into."""
    return Path(constants.HF_HUB_CACHE)


class HubFiles:
    """Files of a hub repository at one revision, fetched when they are needed."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.where = repo if revision is None else f"{repo}@{revision}"
        self._repo = repo
        self._revision = revision

    def exists(self, name: str) -> bool:
        """Whether the repository has such a file; small files are fetched at once."""
        if name.endswith(".safetensors"):
            return True  # fetching tells; asking for each would cost a request
        try:
            self._fetch(name)
        except EntryNotFoundError:
            return False
        return True

    def path(self, name: str) -> Path:
        """Fetch the file into the hub's cache, or find it there."""
        try:
            return self._fetch(name)
        except EntryNotFoundError as error:
            raise CheckpointError(f"{self.where}: {name} is missing") from error

    def header(self, name: str) -> tuple[bytes, int]:
        """Read a shard's header by range request."""
        with _one_line(self.where):
            found = HfApi().parse_safetensors_file_metadata(
                self._repo, name, revision=self._revision
            )
        header = {
            tensor: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": list(info.data_offsets),
            }
            for tensor, info in found.tensors.items()
        }
        ends = [info.data_offsets[1] for info in found.tensors.values()]
        return json.dumps(header).encode(), max(ends, default=0)

    def stamp(self, name: str) -> Stamp:
        """Return the file's tag on the hub; of large files it is their sha256."""
        cached = self._cached(name)
        # The cache names its blobs by their tag, where it can link to them.
        tag = cached.resolve().name if cached is not None else name
        if tag == name:
            with _one_line(self.where):
                url = hf_hub_url(self._repo, name, revision=self._revision)
                tag = get_hf_file_metadata(url).etag or ""
        return Stamp(tag, tag if _SHA256.fullmatch(tag) else None)

    def cached(self, name: str) -> bool:
        """Whether the file is in the hub's cache."""
        return self._cached(name) is not None

    def evict(self, name: str) -> None:
        """Remove a file from the hub's cache, if it is there.

        Its bytes stay where another revision has them too.
        """
        link = self._cached(name)
        if link is None:
            return
        with atomic.error_context(link):
            blob, snapshots = link.resolve(), link.parent.parent
            others = (path for path in snapshots.glob(f"*/{name}") if path != link)
            shared = any(path.resolve() == blob for path in others)
            # Bytes first: a link to nothing is mended by the next download, while
            # bytes without a link would stay for ever.
            if not shared and snapshots.parent.resolve() in blob.parents:
                blob.unlink()
            link.unlink(missing_ok=True)

    def _cached(self, name: str) -> Path | None:
        found = try_to_load_from_cache(self._repo, name, revision=self._revision)
        return Path(found) if isinstance(found, str) else None

    def _fetch(self, name: str) -> Path:
        with _one_line(self.where):
            return Path(hf_hub_download(self._repo, name, revision=self._revision))


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Describe in one line why the hub did not give what was asked for."""
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{where}: no such folder here, and the hub has no such model or revision"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{where}: no such folder here, the hub cannot be reached, and its cache"
            " does not hold the file; connect, or give a local folder"
        ) from error
    except EntryNotFoundError:
        raise
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{where}: the hub did not answer ({reason})") from error


def open_files(model: str, revision: str | None = None) -> Files:
    """Take MODEL as a folder, else as a hub id ``owner/name``.

    Raises
    ------
    CheckpointError
        It is neither.
    UsageError
        A ``revision`` of a folder.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"--revision is for a hub id, and {model} is a folder")
        return FolderFiles(folder)
    if _HUB_ID.fullmatch(model) and not model.startswith((".", "/", "~")):
        return HubFiles(model, revision)
    raise CheckpointError(
        f"{model}: no such folder, and not a hub id of the form owner/name"
    )


def read_header(path: Path, where: str) -> tuple[bytes, int, int]:
    """Read a shard's raw header; gives it, where data starts, and the file's size.

    Raises
    ------
    CheckpointError
        The header is longer than the file or than the format allows.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(file_bytes - 8, _LARGEST_HEADER_BYTES):
            raise CheckpointError(
                f"{where}/{path.name}: says its header has {length} bytes, but the file"
                f" has {file_bytes}; it is no safetensors file or is damaged"
            )
        return file.read(length), 8 + length, file_bytes
