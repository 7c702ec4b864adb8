"""Whether the disks have room for the rest of a run: before it begins, and at its end.

What lies there already of an earlier part of the run is taken off what it needs.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rsq_stream.checkpoint.files import hub_cache
from rsq_stream.config.execution_plan import ExecutionPlan
from rsq_stream.config.run_options import RunOptions
from rsq_stream.errors import DiskFullError
from rsq_stream.storage import atomic


def missing_space(
    execution: ExecutionPlan, options: RunOptions, fetched_bytes: int
) -> str | None:
    """Describe in one line which disk lacks room; None where there is enough.

    Folders on one disk are added up; ``fetched_bytes`` are what the hub's cache grows
    by.
    """
    for folder, needed, free in _disks(execution, options, fetched_bytes):
        if needed > free:
            where = "another --output or --work-dir"
            if fetched_bytes and not options.evict_source:
                where += ", or --evict-source"
            return (
                f"{folder}: {needed} more bytes will be needed on this disk, {free}"
                f" are free; make room, or give {where}"
            )
    return None


@contextmanager
def explaining_full_disk(
    execution: ExecutionPlan, options: RunOptions, to_fetch: Callable[[], int]
) -> Iterator[None]:
    """Add to a full disk's error what the rest of the run needs, and what is free.

    ``to_fetch`` tells by how much the hub's cache will still grow.
    """
    try:
        yield
    except DiskFullError as error:
        needs = "; ".join(
            f"the rest of the run needs {needed} bytes at {folder}, {free} are free"
            for folder, needed, free in _disks(execution, options, to_fetch())
        )
        raise DiskFullError(f"{error}; {needs}") from error


def _disks(
    execution: ExecutionPlan, options: RunOptions, fetched_bytes: int
) -> Iterator[tuple[Path, int, int]]:
    """Return a folder on each disk, the bytes still needed there, the bytes free."""
    output_bytes = execution.output_bytes + execution.small_bytes
    needs = [
        (options.output, output_bytes - _allocated(options.output)),
        (options.work_dir, execution.scratch_bytes - _allocated(options.work_dir)),
    ]
    if fetched_bytes:
        needs.append((hub_cache(), fetched_bytes))
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, left in needs:
        disk = atomic.existing(folder).stat().st_dev
        first, needed = by_disk.get(disk, (folder, 0))
        by_disk[disk] = first, needed + max(0, left)
    for folder, needed in by_disk.values():
        yield folder, needed, shutil.disk_usage(atomic.existing(folder)).free


def _allocated(folder: Path) -> int:
    """Return the bytes that files in a folder occupy; holes do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:  # a file that somebody removed meanwhile occupies nothing
            continue
    return total
