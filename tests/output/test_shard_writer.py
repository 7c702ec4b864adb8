"""The output's shards: laid out beforehand, filled in any order, checked, named."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from rsq_stream.checkpoint.formats._safetensors import index_of, lay_out
from rsq_stream.checkpoint.formats.base import OutputTensor, ShardLayout
from rsq_stream.checkpoint.shards import SINGLE, parse_header
from rsq_stream.errors import DamagedError, OutputError
from rsq_stream.output.shard_writer import ShardWriter

MADE = {
    "a.weight_packed": torch.arange(-30, 33, dtype=torch.int32).view(7, 9),
    "a.weight_scale": torch.randn(7, 3).to(torch.bfloat16),
    "a.weight_shape": torch.tensor([7, 63]),
    "b.weight": torch.randn(5, 11, 3),
    "c.weight": torch.randn(137).half(),
    "d.flag": torch.tensor(True),
    "e.none": torch.empty(0, 4),
}


def announced() -> list[OutputTensor]:
    return [OutputTensor(n, t.dtype, tuple(t.shape)) for n, t in MADE.items()]


def writer(
    folder: Path, limit: int = 700, checksums: dict[str, int] | None = None
) -> tuple[ShardWriter, list[ShardLayout]]:
    layouts = lay_out(announced(), limit)
    return ShardWriter(folder, layouts, checksums or {}), layouts


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def finish_all(made: ShardWriter, folder: Path) -> None:
    for layout in made.full_shards():
        sha256 = made.finish(layout)
        content = (folder / layout.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256


def read_all(folder: Path) -> dict[str, Tensor]:
    read = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a dictionary
                read[name] = opened.get_tensor(name)
            assert opened.metadata() == {"format": "pt"}
    return read


def assert_complete(folder: Path) -> None:
    read = read_all(folder)
    assert read.keys() == MADE.keys()
    for name, tensor in MADE.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_safetensors_reads_what_was_written_in_any_order(tmp_path: Path) -> None:
    made, layouts = writer(tmp_path)
    for name in reversed(MADE):
        made.write(name, MADE[name])
    assert made.full_shards() == layouts
    finish_all(made, tmp_path)
    assert_complete(tmp_path)
    assert made.full_shards() == []
    for layout in layouts:
        assert (tmp_path / layout.name).stat().st_size == layout.size_bytes
        assert len(layout.header) % 8 == 0


def test_strided_tensors_are_written_dense(tmp_path: Path) -> None:
    made, _ = writer(tmp_path)
    for name, tensor in MADE.items():
        apart = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]
        made.write(name, apart.copy_(tensor))
    finish_all(made, tmp_path)
    assert_complete(tmp_path)


def test_no_name_is_seen_before_its_shard_is_finished(tmp_path: Path) -> None:
    made, layouts = writer(tmp_path)
    partial = [f"{layout.name}.partial" for layout in layouts]
    for name, tensor in MADE.items():
        made.write(name, tensor)
        assert not [seen for seen in names(tmp_path) if seen.endswith(".safetensors")]
    made.sync()
    assert names(tmp_path) == partial
    made.finish(layouts[0])
    assert names(tmp_path) == sorted([layouts[0].name, *partial[1:]])
    made.close()


def test_only_whole_shards_are_full(tmp_path: Path) -> None:
    made, layouts = writer(tmp_path)
    first = list(layouts[0].places)
    for name in first[:-1]:
        made.write(name, MADE[name])
    assert made.full_shards() == []
    made.write(first[-1], MADE[first[-1]])
    assert made.full_shards() == layouts[:1]
    made.close()


@pytest.mark.parametrize("done", range(len(MADE) + 1))
def test_a_half_written_shard_is_resumed(tmp_path: Path, done: int) -> None:
    first, _ = writer(tmp_path)
    for name in list(MADE)[:done]:
        first.write(name, MADE[name])
    first.sync()
    first.close()
    second, _ = writer(tmp_path, checksums=first.checksums)
    second.reopen(set())
    for name in list(MADE)[done:]:
        second.write(name, MADE[name])
    finish_all(second, tmp_path)
    assert_complete(tmp_path)


def test_a_named_shard_is_not_opened_again(tmp_path: Path) -> None:
    first, layouts = writer(tmp_path)
    for name in layouts[0].places:
        first.write(name, MADE[name])
    finish_all(first, tmp_path)
    second, _ = writer(tmp_path, checksums=first.checksums)
    second.reopen({layouts[0].name})
    assert second.full_shards() == []
    assert names(tmp_path) == [layouts[0].name]


@pytest.mark.parametrize("what", ["header", "b.weight", "cut", "lost"])
def test_a_damaged_partial_is_noticed_before_it_gets_its_name(
    tmp_path: Path, what: str
) -> None:
    made, layouts = writer(tmp_path, limit=10**6)
    for name, tensor in MADE.items():
        made.write(name, tensor)
    made.sync()
    made.close()
    partial = tmp_path / f"{layouts[0].name}.partial"
    resumed, _ = writer(tmp_path, limit=10**6, checksums=made.checksums)
    if what == "header":
        resumed.reopen(set())  # this writes the header again: damage it after that
    content = bytearray(partial.read_bytes())
    if what == "lost":
        partial.unlink()
    elif what == "cut":
        partial.write_bytes(content[:-40])
    else:
        content[9 if what == "header" else layouts[0].places[what][0] + 5] ^= 1
        partial.write_bytes(content)
    resumed.reopen(set())
    damaged = {"cut": "c.weight", "lost": "a.weight_packed"}
    message = (
        rf"^{partial}: {damaged.get(what, what)} is not what was written;"
        r" .*--restart starts the run over$"
    )
    if what == "header":  # it is known, and written again
        resumed.finish(layouts[0])
        with safe_open(tmp_path / layouts[0].name, "pt") as opened:
            assert set(opened.keys()) == MADE.keys()
        return
    with pytest.raises(DamagedError, match=message) as caught:
        resumed.finish(layouts[0])
    assert caught.value.part == damaged.get(what, what)
    resumed.close()
    assert names(tmp_path) == [partial.name]


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    made, _ = writer(tmp_path)
    message = (
        r"b.weight: torch.float16 \[5, 11, 3\] was to be written where"
        r" torch.float32 \[5, 11, 3\] belongs"
    )
    with pytest.raises(OutputError, match=message):
        made.write("b.weight", MADE["b.weight"].half())
    with pytest.raises(OutputError, match=r"\[165\] was to be written where"):
        made.write("b.weight", MADE["b.weight"].view(-1))
    assert names(tmp_path) == []


def test_shards_are_filled_up_to_the_limit() -> None:
    sizes = [40, 60, 1, 100, 101, 3, 250, 4]
    tensors = [
        OutputTensor(str(place), torch.uint8, (size,))
        for place, size in enumerate(sizes)
    ]
    runs = [list(layout.places) for layout in lay_out(tensors, 100)]
    assert runs == [["0", "1"], ["2"], ["3"], ["4"], ["5"], ["6"], ["7"]]
    assert [layout.name for layout in lay_out(tensors, 10**6)] == [
        "model-00001-of-00001.safetensors"
    ]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 60)), min_size=1),
    st.integers(1, 400),
)
def test_a_layout_is_dense_ordered_and_within_the_limit(
    sizes: list[tuple[int, int]], limit: int
) -> None:
    dtypes = {1: torch.uint8, 2: torch.bfloat16, 4: torch.int32, 8: torch.int64}
    tensors = [
        OutputTensor(f"t{place}", dtypes[width], (count,))
        for place, (width, count) in enumerate(sizes)
    ]
    layouts = lay_out(tensors, limit)
    assert [name for layout in layouts for name in layout.places] == [
        tensor.name for tensor in tensors
    ]
    for layout in layouts:
        length = int.from_bytes(layout.header[:8], "little")
        assert len(layout.header) == 8 + length
        data_bytes = layout.size_bytes - len(layout.header)
        filled = [t for _, t in layout.places.values() if t.size_bytes]
        assert data_bytes <= limit or len(filled) == 1
        entries = parse_header(layout.header[8:], SINGLE, data_bytes, "here")
        offsets = {entry.name: entry.offset for entry in entries}
        for name, (start, _) in layout.places.items():
            assert start == len(layout.header) + offsets[name]


def test_the_index_is_that_of_transformers() -> None:
    layouts = lay_out(announced(), 700)
    assert len(layouts) > 1
    index = index_of(layouts)
    total = sum(tensor.nbytes for tensor in MADE.values())
    assert index["metadata"] == {"total_size": total}
    assert json.loads(json.dumps(index["weight_map"])) == {
        name: layout.name for layout in layouts for name in layout.places
    }
