"""The next block is read while one computes: the same bytes, errors and memory."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rsq_stream.checkpoint.files import FolderFiles
from rsq_stream.checkpoint.prefetch import BlockPrefetch
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.settings import Settings
from rsq_stream.errors import CheckpointError, Interrupted
from rsq_stream.events import BlockFinished, Event
from rsq_stream.model.architecture import read_architecture
from rsq_stream.planning.memory import fit
from rsq_stream.planning.memory.stages import StageMemoryModel
from rsq_stream.planning.quantization_plan import make_plan
from tests.support.toy import (
    Recorder,
    contents,
    execution_for,
    options_for,
    plan_toy,
    toy_checkpoint,
)
from tests.support.toy import run_toy as run

AHEAD: dict[str, Any] = {"execution": {"prefetches_blocks": True}}
RTN: dict[str, Any] = {"method": "rtn", "clip_steps": 4}


class Parts:
    """Parts that are numbers; it knows which thread read them."""

    def __init__(self) -> None:
        self.read: list[tuple[int, bool]] = []
        self.broken: set[int] = set()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, index: int) -> int:
        ahead = threading.current_thread() is not threading.main_thread()
        self.read.append((index, ahead))
        assert not ahead or self.go_on.wait(60)
        if index in self.broken:
            raise CheckpointError(f"part {index} is broken")
        return 10 * index


def test_a_part_is_read_once_ahead() -> None:
    parts = Parts()
    ahead = BlockPrefetch(parts)
    assert ahead.take(0) == 0
    ahead.begin(1)
    assert ahead.take(1) == 10
    assert ahead.take(1) == 10
    assert parts.read == [(0, False), (1, True), (1, False)]


def test_another_part_is_read_where_it_is_needed() -> None:
    parts = Parts()
    ahead = BlockPrefetch(parts)
    ahead.begin(1)
    assert ahead.take(2) == 20
    assert ahead.take(1) == 10
    assert [read for read in parts.read if not read[1]] == [(2, False), (1, False)]


def test_an_error_is_said_where_the_part_is_needed() -> None:
    parts = Parts()
    parts.broken.add(1)
    ahead = BlockPrefetch(parts)
    ahead.begin(1)
    with pytest.raises(CheckpointError, match="part 1 is broken"):
        ahead.take(1)
    ahead.begin(1)
    assert ahead._ahead is not None
    ahead._ahead.thread.join()
    parts.broken.clear()  # it failed ahead, and is whole again
    assert ahead.take(1) == 10


def test_who_waits_can_be_stopped() -> None:
    parts = Parts()
    parts.go_on.clear()

    def check() -> None:
        raise Interrupted("stopped")

    ahead = BlockPrefetch(parts, check)
    ahead.begin(1)
    with pytest.raises(Interrupted):
        ahead.take(1)
    parts.go_on.set()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(
        tmp_path_factory.mktemp("ahead") / "toy", blocks=3, straddle=False
    )


@pytest.mark.parametrize("method", ["rsq", "rtn"])
def test_a_run_has_the_same_bytes(toy: Path, tmp_path: Path, method: str) -> None:
    fields: dict[str, Any] = {"method": method, "clip_steps": 4}
    run(toy, tmp_path / "plain", **fields)
    run(toy, tmp_path / "ahead", **fields, **AHEAD)
    assert contents(tmp_path / "plain") == contents(tmp_path / "ahead")


def test_stopped_anywhere_it_goes_on(toy: Path, tmp_path: Path) -> None:
    heard = Recorder()
    run(toy, tmp_path / "whole", listener=heard, **RTN, **AHEAD)
    whole = contents(tmp_path / "whole")
    for place in range(len(heard.events)):
        output = tmp_path / f"{place}" / "out"
        with pytest.raises(KeyboardInterrupt):
            run(toy, output, listener=Recorder(place), **RTN, **AHEAD)
        run(toy, output, **RTN, **AHEAD)
        assert contents(output) == whole


def test_a_shard_that_changes_is_named_alike(tmp_path: Path) -> None:
    """The last block's norm becomes NaN while the first block is worked on."""
    said = []
    for name, ahead in (("plain", {}), ("ahead", AHEAD)):
        toy = toy_checkpoint(tmp_path / name / "toy", blocks=3, straddle=False)
        entry = Checkpoint(FolderFiles(toy)).entry(
            "model.layers.2.input_layernorm.weight"
        )
        path = toy / entry.shard

        def spoil(event: Event, path: Path = path, offset: int = entry.offset) -> None:
            if isinstance(event, BlockFinished) and event.block == 0:
                with path.open("r+b") as file:
                    start = 8 + int.from_bytes(file.read(8), "little")
                    file.seek(start + offset)
                    file.write(b"\xff" * 4)

        with pytest.raises(CheckpointError) as caught:
            run(toy, tmp_path / name / "out", listener=spoil, **RTN, **ahead)
        said.append(str(caught.value).replace(str(tmp_path / name), ""))
    assert said[0] == said[1]
    assert "holds NaN or infinity" in said[0]


def test_it_is_for_a_gpu_whose_host_has_room(toy: Path) -> None:
    checkpoint = Checkpoint(FolderFiles(toy))
    architecture = read_architecture(checkpoint.config, "here")
    plan = make_plan(
        checkpoint,
        architecture,
        Settings(method="rtn"),
        None,
        device=torch.device("cpu"),
    )
    memory = StageMemoryModel(
        architecture=architecture,
        plan=plan,
        source_type=torch.float32,
        in_flight=1,
        workers=1,
        on_gpu=True,
    )
    ahead = dataclasses.replace(memory, prefetches_blocks=True)
    stored = memory._stored
    for before, after in zip(memory.stages(), ahead.stages(), strict=True):
        more = after.host_bytes - before.host_bytes
        waits = before.name in ("embedding and head", "read and rotate")
        assert more == (0 if waits else stored)
    need = max(made.host_bytes for made in ahead.stages())
    need += fit.HOST_OVERHEAD_BYTES
    for spare, expected in ((0, True), (-1, False)):
        room = fit.MemoryLimits(
            host_bytes=need + spare,
            host_stated=True,
            device_bytes=1 << 40,
            device_stated=True,
            used_bytes=0,
        )
        assert fit.reading_ahead(memory, room).prefetches_blocks == expected


def test_a_host_that_computes_does_not_read_ahead(toy: Path, tmp_path: Path) -> None:
    plan, _ = plan_toy(toy, method="rtn")
    assert not execution_for(toy, plan, options_for(tmp_path / "o")).prefetches_blocks
