"""Reading safetensors shards: equal to safetensors' own, and suspicious of all else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from rsq_stream.checkpoint.files import open_files
from rsq_stream.checkpoint.shards import INDEX, SINGLE, parse_header
from rsq_stream.errors import CheckpointError
from tests.support.toy import open_toy, toy_checkpoint

Entries = dict[str, Any]
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def _bytes(entries: Any, data_bytes: int = 32, length: int | None = None) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    said = len(header) if length is None else length
    return said.to_bytes(8, "little") + header + bytes(range(data_bytes))


def _folder(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / SINGLE).write_bytes(content)
    return folder


def _index(folder: Path, *shards: str) -> Path:
    _folder(folder, b"").joinpath(SINGLE).unlink()
    weight_map = {f"t{number}": shard for number, shard in enumerate(shards)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = toy_checkpoint(tmp_path / "toy", dtype=dtype, shards=3)
    checkpoint = open_toy(folder)
    seen = set()
    for shard in checkpoint.shards:
        with safe_open(folder / shard, "pt") as theirs:
            for name in theirs.keys():  # noqa: SIM118  not a dictionary
                ours, expected = checkpoint.read(name), theirs.get_tensor(name)
                assert ours.dtype == expected.dtype == dtype
                assert torch.equal(ours, expected)
                entry = checkpoint.entry(name)
                assert (entry.shard, entry.shape) == (shard, tuple(expected.shape))
                seen.add(name)
    assert seen == set(checkpoint.tensors)
    assert len(checkpoint.shards) == 3


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (63, 137)])
def test_reads_odd_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = _folder(tmp_path / "odd", b"")
    made = {"a": torch.arange(5), "t": torch.randn(shape), "z": torch.tensor([True])}
    save_file(made, folder / SINGLE)
    checkpoint = open_toy(folder)
    assert all(torch.equal(checkpoint.read(name), made[name]) for name in made)


def test_read_many_gives_names_without_the_prefix(tmp_path: Path) -> None:
    checkpoint = open_toy(toy_checkpoint(tmp_path / "toy"))
    prefix, names = "model.layers.1.mlp.", ["up_proj.weight", "down_proj.weight"]
    read = checkpoint.read_many(prefix, names)
    assert read.keys() == set(names)
    assert all(torch.equal(read[n], checkpoint.read(prefix + n)) for n in names)


def test_the_hash_is_of_names_types_shapes_and_config(tmp_path: Path) -> None:
    first = _folder(tmp_path / "a", _bytes({"a": A, "b": B}))
    again = _folder(tmp_path / "b", _bytes({"b": B, "a": A}))
    other = _folder(tmp_path / "c", _bytes({"a": A | {"shape": [3, 2]}, "b": B}))
    hashes = [open_toy(folder).headers_sha256 for folder in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    (again / "config.json").write_text('{"x": 1}')
    assert open_toy(again).headers_sha256 != hashes[0]


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"says its header has 0 bytes, but the file has 0"),
    "short": (b"\x10\0\0", r"header has 16 bytes, but the file has 3"),
    "beyond": (_bytes({"a": A}, 24, 5000), r"header has 5000 bytes, but the file has"),
    "one-more": (_bytes(b"{}", 0, 3), r"header has 3 bytes, but the file has 10"),
    "2**63": (_bytes({"a": A}, 24, 2**63), rf"header has {2**63} bytes"),
    "not-json": (_bytes(b"{'a'"), r"header is not valid JSON"),
    "not-utf8": (_bytes(b'{"\xff":1}'), r"header is not valid JSON"),
    "list": (_bytes([1, 2]), r"header is not a JSON object"),
    "number": (_bytes(b"7"), r"header is not a JSON object"),
    "nested": (_bytes(b'{"a":' + b"[" * 200_000), r"header is not valid JSON"),
}
BAD_ENTRIES: dict[str, tuple[Entries, str]] = {
    "not-an-entry": ({"a": 7}, r"bad header entry for a"),
    "unknown-dtype": ({"a": A | {"dtype": "F8_E4M3"}, "b": B}, r"bad header entry"),
    "list-dtype": ({"a": A | {"dtype": ["F32"]}, "b": B}, r"bad header entry for a"),
    "no-shape": ({"a": {"dtype": "F32"}, "b": B}, r"bad header entry for a"),
    "one-offset": ({"a": A | {"data_offsets": [24]}}, r"bad header entry for a"),
    "negative": ({"a": A | {"shape": [-2, -3]}, "b": B}, r"a has sizes out of bounds"),
    "huge": ({"a": A | {"shape": [2**48, 0]}}, r"a has sizes out of bounds"),
    "wraps": (
        {"a": A | {"shape": [2**33, 2**33]}, "b": B},
        rf"a of shape .* needs {2**68} bytes, its offsets give 24",
    ),
    "float": ({"a": A | {"shape": [2.0, 3]}, "b": B}, r"a has sizes out of bounds"),
    "bool": ({"a": A | {"shape": [True, 6]}, "b": B}, r"a has sizes out of bounds"),
    "text": ({"a": A | {"shape": "23"}, "b": B}, r"a has sizes out of bounds"),
    "backwards": ({"a": A | {"data_offsets": [24, 0]}, "b": B}, r"offsets give -24"),
    "overlap": (
        {"a": A, "b": B | {"data_offsets": [20, 28]}},
        r"b overlaps or leaves a gap",
    ),
    "gap": ({"a": A, "b": B | {"data_offsets": [26, 34]}}, r"b overlaps or leaves"),
    "late": ({"b": B}, r"b overlaps or leaves a gap"),
    "unowned": ({"a": A}, r"need 24 bytes, the file holds 32; it was cut short or is"),
    "beyond": (
        {"a": A, "b": {"dtype": "F32", "shape": [9], "data_offsets": [24, 60]}},
        r"need 60 bytes, the file holds 32; .*fetch it again",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    folder = _folder(tmp_path / "bad", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_toy(folder)
    assert str(caught.value).startswith(f"{folder}/{SINGLE}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_entry_is_refused(tmp_path: Path, case: str) -> None:
    entries, message = BAD_ENTRIES[case]
    folder = _folder(tmp_path / "bad", _bytes(entries))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_toy(folder)
    assert str(caught.value).startswith(f"{folder}/{SINGLE}: ")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = _index(tmp_path / "two", "x.safetensors", "y.safetensors")
    for shard in ("x", "y"):
        (folder / f"{shard}.safetensors").write_bytes(_bytes({"a": A, "b": B}))
    message = r"y.safetensors: a is in another shard too"
    with pytest.raises(CheckpointError, match=message):
        open_toy(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", "..", ""]
)
def test_an_index_cannot_point_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(_bytes({"a": A, "b": B}))
    folder = _index(tmp_path / "index", name)
    message = rf"{INDEX}: {name!r} is not a plain .safetensors file name"
    with pytest.raises(CheckpointError, match=message):
        open_toy(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"index.json: a JSON object was expected"),
        ("{", r"index.json: not valid JSON"),
        ("{}", r"index.json: no weight_map"),
        ('{"weight_map": {}}', r"index.json: no weight_map"),
        ('{"weight_map": ["x"]}', r"index.json: no weight_map"),
        ("[" * 200_000, r"index.json: not valid JSON"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', r"names x.*is missing"),
    ],
    ids=["list", "cut", "no-map", "empty-map", "map-list", "nested", "nul"],
)
def test_a_bad_index_is_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = _index(tmp_path / "index", "x.safetensors")
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_toy(folder)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = _index(tmp_path / "index", "x.safetensors")
    with pytest.raises(CheckpointError, match=r"names x.safetensors, which is missing"):
        open_toy(folder)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"neither {SINGLE} nor {INDEX}"):
        open_toy(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"index: config.json is missing"):
        open_toy(folder)
    with pytest.raises(CheckpointError, match=r"absent: no such folder, and not a hub"):
        open_files(str(tmp_path / "absent"))


def test_an_entry_is_checked_against_the_config(tmp_path: Path) -> None:
    checkpoint = open_toy(_folder(tmp_path / "a", _bytes({"a": A, "b": B})))
    with pytest.raises(CheckpointError, match=r"no tensor named c$"):
        checkpoint.entry("c")
    message = r"a has shape \[2, 3\], but config.json makes it \[3, 2\]"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.entry("a", (3, 2))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _swap(file: Path) -> None:
    swapped = {"a": A | {"shape": [3, 2]}, "b": B}
    file.write_bytes(_bytes(swapped))


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (_cut, r"cut short or is damaged, fetch it again"),
    (_swap, r"changed since the run began"),
    (Path.unlink, r"model.safetensors is missing"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_change_before_the_first_read_is_noticed(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = _folder(tmp_path / "a", _bytes({"a": A, "b": B}))
    checkpoint = open_toy(folder)
    change(folder / SINGLE)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read("b")


def test_a_cut_between_two_reads_is_noticed(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", _bytes({"a": A, "b": B}))
    checkpoint = open_toy(folder)
    checkpoint.read("a")
    _cut(folder / SINGLE)
    message = r"ends inside b; the file was cut short since the run began"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read("b")


HEADER = json.dumps({"__metadata__": {"format": "pt"}, "a": A, "b": B}).encode()
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(HEADER) - 1), st.binary(max_size=3)), min_size=1
    )
)
def test_damaged_bytes_of_a_header_raise_only_checkpoint_errors(
    changes: list[tuple[int, bytes]],
) -> None:
    header = HEADER
    for place, new in changes:
        header = header[:place] + new + header[place + 1 :]
    _parse(header)


@settings(deadline=None)
@given(st.sampled_from(["dtype", "shape", "data_offsets", "extra", None]), ANY_JSON)
def test_any_value_in_a_header_raises_only_checkpoint_errors(
    field: str | None, value: Any
) -> None:
    entries: Entries = {"a": A, "b": B}
    entries["a"] = value if field is None else A | {field: value}
    _parse(json.dumps(entries).encode())


def _parse(header: bytes) -> None:
    """What parses must be sound: dense, in bounds, of the sizes it says."""
    try:
        entries = parse_header(header, SINGLE, 32, "here")
    except CheckpointError as error:
        assert str(error).startswith("here: ")  # noqa: PT017  most are valid
        return
    assert sum(entry.size_bytes for entry in entries) == 32
    for entry in entries:
        assert 0 <= entry.offset <= entry.offset + entry.size_bytes <= 32
        empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        assert empty.nbytes == entry.size_bytes
