"""What may still be taken of host memory, in control groups made of files."""

from pathlib import Path

import psutil
import pytest

from rsq_stream.runtime.host_memory import available_bytes

MIB = 1 << 20
UNLIMITED = 1 << 60


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=UNLIMITED)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def second(folder: str, limit: str, current: int, inactive: int) -> dict[str, str]:
    """Return the files of a group of version 2."""
    return {
        f"sys/fs/cgroup/{folder}memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{folder}memory.current": f"{current}\n",
        f"sys/fs/cgroup/{folder}memory.stat": f"anon 5\ninactive_file {inactive}\n",
    }


def test_a_machine_without_groups(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == UNLIMITED
    write(tmp_path, {"proc/self/cgroup": "0::/\n"})
    assert available_bytes(tmp_path) == UNLIMITED


def test_a_container_has_its_group_at_the_root(tmp_path: Path) -> None:
    """What the page cache has is free; more than the limit leaves nothing."""
    write(tmp_path, {"proc/self/cgroup": "0::/\n"})
    write(tmp_path, second("", str(512 * MIB), 200 * MIB, 80 * MIB))
    assert available_bytes(tmp_path) == 392 * MIB
    write(tmp_path, second("", str(512 * MIB), 600 * MIB, 0))
    assert available_bytes(tmp_path) == 0
    write(tmp_path, second("", "max", 600 * MIB, 0))
    assert available_bytes(tmp_path) == UNLIMITED


def test_the_groups_around_it_count(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/user.slice/run.scope\n"})
    write(tmp_path, second("user.slice/run.scope/", "max", 10 * MIB, 0))
    write(tmp_path, second("user.slice/", str(100 * MIB), 30 * MIB, 5 * MIB))
    write(tmp_path, second("other.slice/", str(MIB), 0, 0))
    assert available_bytes(tmp_path) == 75 * MIB


def test_groups_of_the_first_version(tmp_path: Path) -> None:
    lines = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/x\n"
    folder = "sys/fs/cgroup/memory/"
    write(
        tmp_path,
        {
            "proc/self/cgroup": lines,
            f"{folder}memory.limit_in_bytes": f"{64 * MIB}",
            f"{folder}memory.usage_in_bytes": f"{16 * MIB}",
            f"{folder}memory.stat": f"cache 1\ntotal_inactive_file {4 * MIB}\n",
        },
    )
    assert available_bytes(tmp_path) == 52 * MIB


@pytest.mark.parametrize("spoiled", ["memory.max", "memory.current", "memory.stat"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, spoiled: str) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/a\nwhat\n"})
    write(tmp_path, second("a/", str(MIB), 0, 0))
    assert available_bytes(tmp_path) == MIB
    write(tmp_path, {f"sys/fs/cgroup/a/{spoiled}": "?\n"})
    assert available_bytes(tmp_path) == UNLIMITED
