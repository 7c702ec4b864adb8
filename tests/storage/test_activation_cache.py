"""Activation slots: what is read is what was written, or an error says why not."""

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from rsq_stream.errors import DamagedError, ScratchError
from rsq_stream.storage import activation_cache
from rsq_stream.storage.activation_cache import Slot
from rsq_stream.storage.activation_shape import SlotShape
from rsq_stream.storage.direct_io import has_direct_io

TYPES = [torch.float32, torch.bfloat16, torch.float16]
ODD = SlotShape(7, 5, 12, 3, torch.float32)
"""Three units, of which the last holds one sequence."""


@pytest.fixture
def tmp_path(disk_folder: Path) -> Iterator[Path]:
    """On a disk, as direct I/O is not a matter of memory."""
    with tempfile.TemporaryDirectory(dir=disk_folder) as folder:
        yield Path(folder)


@contextmanager
def opened(
    folder: Path, shape: SlotShape, resident: int = 0, *, direct: bool = False
) -> Iterator[Slot]:
    slot = Slot(folder, shape, resident, 2, direct=direct)
    try:
        yield slot
    finally:
        slot.close()


def values(shape: SlotShape, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape.unit_shape(unit), generator=generator).to(shape.dtype)
        for unit in range(shape.units)
    ]


def fill(slot: Slot, units: list[Tensor], *, durable: bool = True) -> None:
    for unit, x_BTD in enumerate(units):
        slot.write(unit, x_BTD, durable=durable)
    slot.flush(durable=durable)


def same(slot: Slot, units: list[Tensor]) -> bool:
    read = list(slot.read(range(slot.shape.units)))
    assert all(x_BTD.dtype == slot.shape.dtype for x_BTD in read)
    return all(torch.equal(*pair) for pair in zip(read, units, strict=True))


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("resident", [0, 2, 3])
@pytest.mark.parametrize("sizes", [(7, 5, 12, 3), (1, 1, 1, 1), (9, 63, 137, 2)])
@pytest.mark.parametrize("dtype", TYPES)
def test_round_trip(
    tmp_path: Path,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    resident: int,
    direct: bool,
) -> None:
    if direct and not has_direct_io(tmp_path):
        pytest.skip("the file system of tmp_path takes no O_DIRECT")
    shape = SlotShape(*sizes, dtype)
    written = values(shape)
    with opened(tmp_path / "x", shape, resident, direct=direct) as slot:
        fill(slot, written)
        assert same(slot, written)
        assert same(slot, written)
        assert slot.checksums.keys() == set(range(shape.units))
        checksums = slot.checksums
    # Another process goes on with what is on disk and the journal's checksums.
    with opened(tmp_path / "x", shape, resident, direct=direct) as resumed:
        resumed.checksums = checksums
        assert same(resumed, written)


def test_sizes() -> None:
    assert ODD.units == 3
    assert [ODD.unit_shape(unit)[0] for unit in range(3)] == [3, 3, 1]
    assert ODD.unit_bytes == 3 * 5 * 12 * 4
    assert ODD.slot_bytes == 7 * 5 * 12 * 4
    half = SlotShape(7, 5, 12, 3, torch.bfloat16)
    assert (half.unit_bytes, half.slot_bytes) == (360, 840)


@pytest.mark.parametrize("resident", [0, 1, 3])
def test_the_last_write_counts(tmp_path: Path, resident: int) -> None:
    first, second = values(ODD, 1), values(ODD, 2)
    with opened(tmp_path / "x", ODD, resident) as slot:
        fill(slot, first, durable=False)
        fill(slot, second, durable=False)
        assert same(slot, second)
        # In place, while the read runs ahead: as evaluation does.
        for unit, x_BTD in enumerate(slot.read(range(3))):
            slot.write(unit, x_BTD + 1, durable=False)
        slot.flush(durable=False)
        assert same(slot, [x_BTD + 1 for x_BTD in second])


def test_resident_units_touch_no_disk_unless_durable(tmp_path: Path) -> None:
    with opened(tmp_path / "x", ODD, 3) as slot:
        fill(slot, values(ODD), durable=False)
        assert not (tmp_path / "x").exists()
        fill(slot, values(ODD), durable=True)
        assert len(list((tmp_path / "x").glob("c.*"))) == 3


def test_units_come_in_the_order_asked_for(tmp_path: Path) -> None:
    written = values(ODD)
    with opened(tmp_path / "x", ODD, 1) as slot:
        fill(slot, written)
        order = [2, 0, 1, 0]
        for unit, x_BTD in zip(order, slot.read(order), strict=True):
            assert torch.equal(x_BTD, written[unit])


@pytest.mark.parametrize("dtype", TYPES)
def test_plain_zarr_reads_the_array(tmp_path: Path, dtype: torch.dtype) -> None:
    shape = SlotShape(7, 5, 12, 3, dtype)
    written = values(shape)
    with opened(tmp_path / "x", shape) as slot:
        fill(slot, written)
    array: zarr.Array[Any] = zarr.open_array(tmp_path / "x", mode="r")
    assert array.metadata.zarr_format == 3
    assert (array.shape, array.chunks) == ((9, 5, 12), (3, 5, 12))
    unsigned = {4: torch.uint32, 2: torch.uint16}[dtype.itemsize]
    expected = torch.cat(written).view(unsigned).numpy()
    assert array.dtype == expected.dtype
    assert np.array_equal(np.asarray(array[:7]), expected)
    assert not np.asarray(array[7:]).any()  # the last chunk is whole: zeros follow


def _flip(chunk: Path) -> None:
    content = bytearray(chunk.read_bytes())
    content[17] ^= 1
    chunk.write_bytes(content)


def _truncate(chunk: Path) -> None:
    os.truncate(chunk, 100)


def _zeros(chunk: Path) -> None:
    chunk.write_bytes(bytes(chunk.stat().st_size))


@pytest.mark.parametrize("damage", [_flip, _zeros, Path.unlink, _truncate])
def test_a_damaged_chunk_is_named(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with opened(tmp_path / "x", ODD) as slot:
        fill(slot, values(ODD))
        damage(tmp_path / "x" / "c.1.0.0")
        reads = slot.read(range(3))
        assert torch.equal(next(reads), values(ODD)[0])
        message = r"x/c.1.0.0: the stored activations are damaged or missing; --restart"
        with pytest.raises(DamagedError, match=message):
            next(reads)


@pytest.mark.parametrize("resident", [0, 1])
def test_a_chunk_that_was_never_written_is_not_zeros(
    tmp_path: Path, resident: int
) -> None:
    with opened(tmp_path / "x", ODD, resident) as slot:
        slot.write(0, values(ODD)[0], durable=True)
        slot.flush(durable=True)
        assert list(slot.read([0]))
        with pytest.raises(DamagedError, match=r"c\.2\.0\.0: .* missing"):
            list(slot.read([2]))
        slot.clear()
        with pytest.raises(DamagedError, match=r"c\.0\.0\.0: "):
            list(slot.read([0]))


def test_a_damaged_array_is_explained(tmp_path: Path) -> None:
    with opened(tmp_path / "x", ODD) as slot:
        fill(slot, values(ODD))
    (tmp_path / "x" / "zarr.json").write_text("{")
    with opened(tmp_path / "x", ODD) as slot, pytest.raises(DamagedError, match="x"):
        list(slot.read([0]))


def test_a_full_disk_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(activation_cache, "write_chunk", full)
    with opened(tmp_path / "x", ODD) as slot:
        slot.write(0, values(ODD)[0], durable=False)
        message = rf"^{tmp_path}/x[^:]*: the disk is full \(\d+ bytes free\); make room"
        with pytest.raises(ScratchError, match=message):
            slot.flush(durable=False)


def test_a_folder_that_cannot_be_made_is_explained_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with opened(tmp_path / "file" / "x", ODD) as slot:
        slot.write(0, values(ODD)[0], durable=False)
        with pytest.raises(ScratchError, match=r"Not a directory") as caught:
            slot.flush(durable=False)
    assert str(caught.value).count(str(tmp_path)) == 1


def test_a_wrong_shape_or_type_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "x", ODD) as slot:
        x_BTD = values(ODD)[0]
        with pytest.raises(ValueError, match=r"unit 2: torch.float32 \(3, 5, 12\)"):
            slot.write(2, x_BTD, durable=False)
        with pytest.raises(ValueError, match=r"unit 0: torch\.float16"):
            slot.write(0, x_BTD.half(), durable=False)


def test_direct_io_is_probed_without_a_trace(tmp_path: Path) -> None:
    assert has_direct_io(tmp_path) in (False, True)
    assert list(tmp_path.iterdir()) == []


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@contextmanager
def peak_growth(every_s: float = 0.002) -> Iterator[list[int]]:
    """Return a list that holds the peak of anonymous memory above the start's."""
    start, peak, done = _anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            peak[0] = max(peak[0], _anonymous_bytes() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)
def test_memory_is_flat(tmp_path: Path) -> None:
    shape = SlotShape(200, 512, 1024, 1, torch.float32)  # 200 units of 2 MiB
    with opened(tmp_path / "x", shape, direct=has_direct_io(tmp_path)) as slot:
        slot.write(0, torch.zeros(1, 512, 1024), durable=False)
        slot.flush(durable=False)
        with peak_growth() as peak:
            for unit in range(shape.units):
                slot.write(unit, torch.full((1, 512, 1024), unit * 1.0), durable=False)
            slot.flush(durable=False)
            for unit, x_BTD in enumerate(slot.read(range(shape.units))):
                assert x_BTD[0, 0, 0] == unit
    assert 1 << 20 < peak[0] < 64 << 20


def test_the_meter_would_see_it() -> None:
    with peak_growth() as peak:
        held = torch.ones(100 << 18)
        threading.Event().wait(0.05)
    assert peak[0] > 90 << 20
    assert held.numel()
