"""One place writes: a name holds the whole content or is not there."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rsq_stream.errors import DiskFullError, OutputError, RsqError, ScratchError
from rsq_stream.storage import atomic
from rsq_stream.storage.atomic import PARTIAL, PartialFile

CONTENT = bytes(range(256)) * 40


def _raise(number: int) -> Any:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    atomic.write_file(path, b"old")
    atomic.write_file(path, CONTENT)
    assert path.read_bytes() == CONTENT
    assert _names(tmp_path) == ["config.json"]


def test_a_name_comes_after_its_content_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "config.json", []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        assert source.read_bytes() == CONTENT
        steps.append("rename")
        return replace(source, target)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, synced, raising=False)
    monkeypatch.setattr(Path, "replace", renamed)
    expected = [f"{path}{PARTIAL}", "rename", str(tmp_path)]
    atomic.write_file(path, CONTENT)
    assert steps == expected
    path.unlink()
    steps.clear()
    file = PartialFile(path, len(CONTENT))
    file.write(0, memoryview(CONTENT))
    file.commit()
    assert steps[0] == expected[0]
    assert steps[-2:] == expected[-2:]


@pytest.mark.parametrize("call", ["fdatasync", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "config.json"
    atomic.write_file(path, b"old")
    if call == "fsync":  # of the file, where there is nothing less
        monkeypatch.delattr(os, "fdatasync", raising=False)
    monkeypatch.setattr(
        Path if call == "replace" else os, call, _raise(errno.EIO), raising=False
    )
    message = rf"^{path}: {os.strerror(errno.EIO)}$"
    with pytest.raises(ScratchError, match=message):
        atomic.write_file(path, CONTENT)
    assert path.read_bytes() == b"old"


def test_a_partial_file_has_no_name_until_it_is_committed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    file = PartialFile(path, len(CONTENT))
    file.write(200, memoryview(CONTENT)[200:])
    file.write(0, memoryview(CONTENT)[:200])
    file.sync()
    assert _names(tmp_path) == [path.name + PARTIAL]
    assert file.read(100, 300) == CONTENT[100:400]
    file.commit()
    assert path.read_bytes() == CONTENT
    assert _names(tmp_path) == [path.name]
    file.close()


def test_a_partial_file_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    first = PartialFile(path, len(CONTENT))
    first.write(0, memoryview(CONTENT)[:5000])
    first.close()
    second = PartialFile(path, len(CONTENT))
    second.write(5000, memoryview(CONTENT)[5000:])
    second.commit()
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("before", [3, len(CONTENT) + 9])
def test_a_partial_file_has_its_size_from_the_start(
    tmp_path: Path, before: int
) -> None:
    path = tmp_path / "model.safetensors"
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(bytes(before))
    PartialFile(path, len(CONTENT)).close()
    assert partial.stat().st_size == len(CONTENT)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (9, 2), (11, 0), (0, 11)])
def test_bytes_outside_a_file_are_refused(
    tmp_path: Path, offset: int, length: int
) -> None:
    file = PartialFile(tmp_path / "x", 10)
    with pytest.raises(ValueError, match=r"x: bytes beyond the file's size"):
        file.write(offset, memoryview(bytes(length)))
    file.close()


def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, part, at: pwrite(fd, part[:7], at))
    file = PartialFile(tmp_path / "x", 1000)
    file.write(100, memoryview(CONTENT)[:900])
    file.commit()
    assert (tmp_path / "x").read_bytes() == bytes(100) + CONTENT[:900]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "model.safetensors"
    file = PartialFile(path, len(CONTENT))
    usage = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "pwrite", _raise(number))
    with pytest.raises(ScratchError) as caught:
        file.write(0, memoryview(CONTENT))
    file.close()
    assert str(caught.value) == (
        f"{path}: the disk is full (4096 bytes free);"
        " make room and run the same command again, it goes on where it stopped"
    )
    assert isinstance(caught.value, OSError)


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    full = atomic.explanation(tmp_path / "absent" / "deeper" / "file", error)
    assert isinstance(full, DiskFullError)
    assert "bytes free" in str(full)


def test_other_errors_keep_the_systems_words(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "x"
    with pytest.raises(ScratchError, match=rf"^{path}: No such file or directory$"):
        PartialFile(path, 10)
    with pytest.raises(ScratchError, match=rf"^{path}: No such file or directory$"):
        atomic.write_file(path, b"")


def test_our_own_errors_pass_unchanged(tmp_path: Path) -> None:
    error = OutputError("said already")
    with pytest.raises(RsqError) as caught, atomic.error_context(tmp_path):
        raise error
    assert caught.value is error


def test_a_tree_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"x")
    atomic.remove_tree(tmp_path / "a")
    atomic.remove_tree(tmp_path / "a")
    assert _names(tmp_path) == []
