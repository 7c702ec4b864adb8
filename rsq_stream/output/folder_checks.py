"""Where an output may go, and what may be removed there.

Nothing that a run did not put into a folder is ever touched.
"""

from pathlib import Path

from rsq_stream.checkpoint.files import SIDE_FILES
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.manifest import MANIFEST, SEAL
from rsq_stream.errors import OutputError
from rsq_stream.storage import atomic

CARD = "README.md"


def small_files() -> frozenset[str]:
    """Name all that an output of any format may hold beside its shards."""
    by_format = (stored.small_file_names for stored in FORMATS.values())
    return frozenset({CARD, MANIFEST, SEAL, *SIDE_FILES}).union(*by_format)


def _is_shard(name: str) -> bool:
    return any(stored.shard_name.fullmatch(name) for stored in FORMATS.values())


def require_usable(path: Path, *, resuming: bool) -> None:
    """Refuse an output folder that holds anything but an unfinished run's parts.

    Raises
    ------
    OutputError
        The folder is a file, or holds files that no unfinished run put there.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; give a folder with --output")
    if resuming or not path.exists():
        return
    found = sorted(entry.name for entry in path.iterdir())
    if SEAL in found:
        raise OutputError(
            f"{path}: the output folder must be new or empty, it holds a finished"
            " output; remove it or give another --output"
        )
    parts = [name for name in found if name.endswith(atomic.PARTIAL)]
    if parts:
        raise OutputError(
            f"{path}: holds parts of an unfinished run ({parts[0]}), whose work folder"
            " is not the one given; give its --work-dir to go on, or empty the folder"
        )
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise OutputError(
            f"{path}: the output folder must be new or empty, it holds"
            f" {found[0]}{more}; empty it or give another --output"
        )


def require_apart(path: Path, work_dir: Path) -> None:
    """Refuse a work folder that is the output, or around it: it is removed.

    Raises
    ------
    OutputError
        Removing the work folder would remove the output.
    """
    output, work = path.resolve(), work_dir.resolve()
    if output == work or work in output.parents or output in work.parents:
        raise OutputError(
            f"{path}: output and work folder ({work_dir}) must lie side by side,"
            " neither in the other; give another --output or --work-dir"
        )


def discard_unfinished(path: Path) -> None:
    """For ``--restart``: remove what an unfinished run left in the output.

    Only called where the work folder holds such a run. A finished output (it
    has its seal) and foreign files are left alone, so that ``require_usable``
    can refuse them.
    """
    if not path.is_dir() or (path / SEAL).exists():
        return
    names = small_files()
    for part in sorted(path.iterdir()):
        name = part.name.removesuffix(atomic.PARTIAL)
        if name in names or _is_shard(name):
            atomic.remove_file(part)
