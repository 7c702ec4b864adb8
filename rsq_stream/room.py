"""Whether the disks have room for the rest of a run: before it begins, and at its end.

What lies there already of an earlier part of the run is taken off what it needs.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsq_stream.errors import DiskFullError
from rsq_stream.execution import ExecutionPlan, RunOptions
from rsq_stream.storage import atomic


def shortage(execution: ExecutionPlan, options: RunOptions) -> str | None:
    """Say in one line which disk lacks room; None where there is enough.

    Folders on one disk are added up.
    """
    for folder, needed, free in _disks(execution, options):
        if needed > free:
            return (
                f"{folder}: {needed} more bytes will be needed on this disk, {free}"
                " are free; make room, or give another --output or --work-dir"
            )
    return None


@contextmanager
def said_when_full(execution: ExecutionPlan, options: RunOptions) -> Iterator[None]:
    """Add to a full disk's error what the rest of the run needs, and what is free."""
    try:
        yield
    except DiskFullError as error:
        needs = "; ".join(
            f"the rest of the run needs {needed} bytes at {folder}, {free} are free"
            for folder, needed, free in _disks(execution, options)
        )
        raise DiskFullError(f"{error}; {needs}") from error


def _disks(
    execution: ExecutionPlan, options: RunOptions
) -> Iterator[tuple[Path, int, int]]:
    """Give a folder on each disk, the bytes still needed there, the bytes free."""
    needs = (
        (options.output, execution.output_bytes + execution.small_bytes),
        (options.work_dir, execution.scratch_bytes),
    )
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, whole in needs:
        disk = atomic.existing(folder).stat().st_dev
        first, needed = by_disk.get(disk, (folder, 0))
        by_disk[disk] = first, needed + max(0, whole - _allocated(folder))
    for folder, needed in by_disk.values():
        yield folder, needed, shutil.disk_usage(atomic.existing(folder)).free


def _allocated(folder: Path) -> int:
    """Give the bytes that files in a folder occupy; holes do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:  # a file that somebody removed meanwhile occupies nothing
            continue
    return total
