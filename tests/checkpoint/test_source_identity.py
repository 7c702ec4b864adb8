"""A run goes on only from the source it began with: every byte, every file."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from rsq_stream.checkpoint.files import FolderFiles
from rsq_stream.errors import CheckpointError, Interrupted, PlanMismatchError
from rsq_stream.events import BlockFinished, Event
from rsq_stream.output.verify import verify
from tests.pipeline.test_repair import stopped
from tests.pipeline.test_resume import RUN, SMALL
from tests.support.toy import contents, open_toy, read_json, run_toy, toy_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("identity") / "toy", **SMALL)


@pytest.fixture(scope="module")
def whole(original: Path) -> dict[str, bytes]:
    run_toy(original, original.with_name("whole"), **RUN)
    return contents(original.with_name("whole"))


@pytest.fixture
def toy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "toy"))


def interrupted(toy: Path, output: Path, **settings: Any) -> None:
    """Leave a run behind that has done its first block, and its first shard."""
    stop = threading.Event()

    def listener(event: Event) -> None:
        if isinstance(event, BlockFinished):
            stop.set()

    with pytest.raises(Interrupted):
        run_toy(toy, output, listener=listener, stop=stop, **RUN | settings)


def changed(toy: Path, name: str) -> Path:
    """Flip a bit of a tensor's first byte; gives the shard."""
    checkpoint = open_toy(toy)
    shard = toy / checkpoint.entry(name).shard
    raw = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + checkpoint.entry(name).offset] ^= 1
    shard.write_bytes(raw)
    return shard


@pytest.mark.parametrize("put_back", [False, True])
@pytest.mark.parametrize("block", [0, 1])
def test_a_flipped_byte_in_the_source_is_refused(
    toy: Path, tmp_path: Path, block: int, put_back: bool
) -> None:
    # Block 0 was read before the stop, block 1 was not; both were hashed.
    interrupted(toy, tmp_path / "out")
    name = f"model.layers.{block}.mlp.down_proj.weight"
    before = (toy / open_toy(toy).entry(name).shard).stat()
    shard = changed(toy, name)
    if put_back:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert shard.stat().st_mtime_ns == before.st_mtime_ns
    message = rf"^{shard}: its sha256 was \w+ and is now \w+; --restart starts over, "
    with pytest.raises(PlanMismatchError, match=message):
        run_toy(toy, tmp_path / "out", **RUN)


def test_what_is_read_again_is_checked_whatever_the_stamp_says(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FolderFiles(toy)
    stamps = {name: files.stamp(name) for name in (*SHARDS, "generation_config.json")}
    monkeypatch.setattr(FolderFiles, "stamp", lambda _, name: stamps[name])
    stopped(toy, tmp_path / "out", 1, "mlp in", **RUN, propagate=0.0)
    name = "model.layers.1.mlp.down_proj.weight"
    shard = changed(toy, name)
    message = rf"^{shard}: the sha256 of {name} was \w+ and is now \w+; --restart"
    with pytest.raises(CheckpointError, match=message):
        run_toy(toy, tmp_path / "out", **RUN)


@pytest.mark.parametrize("how", ["touch", "copy"])
def test_the_same_bytes_under_another_stamp_go_on(
    toy: Path, tmp_path: Path, whole: dict[str, bytes], how: str
) -> None:
    interrupted(toy, tmp_path / "out")
    if how == "touch":
        for shard in SHARDS:
            os.utime(toy / shard, ns=(1, 1))
    else:
        toy = Path(shutil.copytree(toy, tmp_path / "elsewhere"))
    assert run_toy(toy, tmp_path / "out", **RUN).resumed_at == 1
    assert contents(tmp_path / "out") == whole


def test_a_source_that_was_not_hashed_yet_must_not_change(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stopped before the first output shard is whole, and before the hashing is done.
    monkeypatch.setattr(
        "rsq_stream.checkpoint.source_identity.SourceIdentity.start", lambda _: None
    )
    one_shard = {"plan": {"shard_bytes": 1 << 20}}
    interrupted(toy, tmp_path / "out", **one_shard)
    os.utime(toy / SHARDS[0], ns=(1, 1))
    message = rf"^{toy / SHARDS[0]}: was .* before it knew the file's content; --rest"
    with pytest.raises(PlanMismatchError, match=message):
        run_toy(toy, tmp_path / "out", **RUN | one_shard)


def test_small_files_are_part_of_the_source(toy: Path, tmp_path: Path) -> None:
    interrupted(toy, tmp_path / "out")
    (toy / "generation_config.json").write_text('{"top_k": 3}')
    with pytest.raises(PlanMismatchError, match=r"generation_config.json: its sha256"):
        run_toy(toy, tmp_path / "out", **RUN)
    (toy / "generation_config.json").unlink()
    with pytest.raises(PlanMismatchError, match=r"generation_config.json: is gone"):
        run_toy(toy, tmp_path / "out", **RUN)


def test_the_output_names_its_source_and_verify_holds_it_to_that(
    toy: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    run_toy(toy, tmp_path / "out", **RUN)
    source = read_json(tmp_path / "out" / "rsq_stream.json")["source"]
    assert sorted(source) == sorted(SHARDS)
    assert verify(tmp_path / "out", open_toy(toy)).problems == []
    shard = changed(toy, "model.layers.1.mlp.up_proj.weight")
    message = rf"^{shard}: its sha256 is \w+, the output was made from \w+$"
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "out", open_toy(toy))
    assert contents(tmp_path / "out") == whole
