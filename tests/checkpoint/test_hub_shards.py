"""``--evict-source``: a hub model's shards come ahead of need, and go after use."""

import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError

from rsq_stream.checkpoint import files
from rsq_stream.checkpoint.files import HubFiles, read_header
from rsq_stream.checkpoint.hub_shards import NO_BLOCK, ShardSchedule, bytes_to_fetch
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.run_options import RunOptions
from rsq_stream.errors import CheckpointError, Interrupted, ScratchError, UsageError
from rsq_stream.events import BlockFinished, Event, Listener, ignore
from rsq_stream.pipeline.job import RunSummary
from rsq_stream.pipeline.quantize import quantize
from rsq_stream.planning.execution_plan import plan_execution
from rsq_stream.planning.validate import inspect_checkpoint
from tests.support.cli_runs import Run
from tests.support.toy import (
    contents,
    job_of,
    open_toy,
    options_for,
    plan_toy,
    run_toy,
    toy_checkpoint,
)

RUN: dict[str, Any] = {"method": "rtn", "clip_steps": 4}
ID, COMMIT = "owner/toy", "c0ffee"


class Hub:
    """A hub with one repository and a cache laid out as the hub's own client does."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.place = cache / "models--owner--toy"
        self.snapshot = self.place / "snapshots" / COMMIT
        self.fetched: list[str] = []
        self.most = 0
        self.ahead: list[str] = []
        self.broken: set[str] = set()
        (self.place / "blobs").mkdir(parents=True)
        (self.place / "refs").mkdir()
        (self.place / "refs" / "main").write_text(COMMIT)
        self.snapshot.mkdir(parents=True)
        self._lock = threading.Lock()

    def tag(self, name: str) -> str:
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()

    def download(self, repo: str, name: str, *, revision: str | None) -> str:
        assert (repo, revision) == (ID, None)
        if not (self.folder / name).is_file():
            raise EntryNotFoundError(name)
        with self._lock:
            link = self.snapshot / name
            if not link.is_file():
                if name in self.broken:
                    self.broken.discard(name)
                    raise OSError("connection lost")
                blob = self.place / "blobs" / self.tag(name)
                shutil.copy(self.folder / name, blob)
                link.unlink(missing_ok=True)
                link.symlink_to(blob)
                self.fetched.append(name)
                if threading.current_thread() is not threading.main_thread():
                    self.ahead.append(name)
                self.most = max(self.most, len(self.here()))
            return str(link)

    def here(self) -> list[str]:
        """Return the shards in the cache, by their bytes."""
        links = sorted(self.snapshot.glob("*.safetensors"))
        found = [link.name for link in links if link.is_file()]
        blobs = {path.name for path in (self.place / "blobs").iterdir()}
        assert {self.tag(name) for name in found} <= blobs
        return found

    def shards(self) -> list[str]:
        return [name for name in self.fetched if name.endswith(".safetensors")]

    def parse_safetensors_file_metadata(
        self, repo: str, name: str, *, revision: str | None
    ) -> SimpleNamespace:
        assert (repo, revision) == (ID, None)
        header = json.loads(read_header(self.folder / name, "hub")[0])
        header.pop("__metadata__", None)
        return SimpleNamespace(
            tensors={key: SimpleNamespace(**value) for key, value in header.items()}
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(
        tmp_path_factory.mktemp("supply") / "toy",
        width=32,
        heads=2,
        kv_heads=1,
        mlp=44,
        vocabulary=64,
        blocks=6,
        shards=6,
        straddle=False,
    )


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    run_toy(folder, folder.with_name("whole"), **RUN)
    return contents(folder.with_name("whole"))


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(folder, tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(files, "hf_hub_download", made.download)
    monkeypatch.setattr(files, "HfApi", lambda: made)
    monkeypatch.setattr(files, "hf_hub_url", lambda repo, name, revision: name)
    monkeypatch.setattr(
        files,
        "get_hf_file_metadata",
        lambda name: SimpleNamespace(etag=made.tag(name)),
    )
    return made


def planned(
    hub: Hub, output: Path, **options: Any
) -> tuple[Checkpoint, QuantizationPlan, RunOptions, Any]:
    checkpoint = Checkpoint(HubFiles(ID, None))
    plan, windows = plan_toy(hub.folder, **RUN)
    return checkpoint, plan, options_for(output, **options), windows


def run_hub(
    hub: Hub,
    output: Path,
    *,
    listener: Listener = ignore,
    stop: threading.Event | None = None,
    evict_source: bool = True,
) -> RunSummary:
    checkpoint, plan, options, windows = planned(hub, output, evict_source=evict_source)
    made = plan_execution(checkpoint, inspect_checkpoint(checkpoint), plan, options)
    made = dataclasses.replace(made, in_flight=1)
    job = job_of(
        checkpoint, plan=plan, execution=made, options=options, windows=windows
    )
    return quantize(job, listener=listener, stop=stop)


def test_shards_come_once_ahead_of_need_and_go(
    hub: Hub, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    run_hub(hub, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert sorted(hub.shards()) == sorted(set(hub.shards()))
    assert len(hub.shards()) == 7
    assert len(hub.ahead) >= 3
    assert hub.here() == []
    small = {hub.tag(name) for name in ("config.json", "generation_config.json")}
    index = hub.tag("model.safetensors.index.json")
    assert {path.name for path in (hub.place / "blobs").iterdir()} == {*small, index}
    assert hub.most < 5


def test_without_the_option_all_shards_stay(
    hub: Hub, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    run_hub(hub, tmp_path / "out", evict_source=False)
    assert contents(tmp_path / "out") == whole
    assert len(hub.here()) == 7
    assert hub.ahead == []


def test_what_was_there_before_stays(hub: Hub, tmp_path: Path) -> None:
    before = ["model-00002-of-00007.safetensors", "model-00005-of-00007.safetensors"]
    for name in before:
        hub.download(ID, name, revision=None)
    run_hub(hub, tmp_path / "out")
    assert hub.here() == before


def test_the_bytes_of_another_revision_stay(hub: Hub, tmp_path: Path) -> None:
    name = "model-00003-of-00007.safetensors"
    other = hub.place / "snapshots" / "deadbeef"
    other.mkdir()
    blob = hub.place / "blobs" / hub.tag(name)
    shutil.copy(hub.folder / name, blob)
    (other / name).symlink_to(blob)
    run_hub(hub, tmp_path / "out")
    assert hub.here() == []
    assert (other / name).read_bytes() == (hub.folder / name).read_bytes()


def after_block(block: int, act: Callable[[], None]) -> Listener:
    def listener(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.block == block:
            act()

    return listener


def test_a_resumed_run_fetches_what_is_needed_and_removes_its_own(
    hub: Hub, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    kept = "model-00001-of-00007.safetensors"
    hub.download(ID, kept, revision=None)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        run_hub(hub, tmp_path / "out", listener=after_block(3, stop.set), stop=stop)
    needs = ShardSchedule(
        open_toy(hub.folder), inspect_checkpoint(open_toy(hub.folder))
    )
    over = {shard for shard, last in needs.last.items() if last < 3} - {kept}
    assert over
    assert over.isdisjoint(hub.here())
    assert set(hub.here()) - {kept}  # what the dead run fetched, this one removes
    hub.fetched.clear()
    assert run_hub(hub, tmp_path / "out").resumed_at == 4
    assert set(hub.shards()) <= set(needs.from_block(4))
    assert hub.here() == [kept]
    assert contents(tmp_path / "out") == whole


def test_a_download_that_fails_ahead_is_tried_again_when_needed(
    hub: Hub, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    hub.broken = {"model-00003-of-00007.safetensors"}
    try:
        run_hub(hub, tmp_path / "out")
    except CheckpointError as error:  # it was needed at once
        assert "connection lost" in str(error)  # noqa: PT017  either end is sound
        run_hub(hub, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_the_plan_says_how_much_is_on_disk(hub: Hub, tmp_path: Path) -> None:
    checkpoint, plan, options, _ = planned(hub, tmp_path / "out", evict_source=True)
    architecture = inspect_checkpoint(checkpoint)
    made = plan_execution(checkpoint, architecture, plan, options)
    needs = ShardSchedule(checkpoint, architecture)
    assert needs.of(NO_BLOCK)[0] == checkpoint.entry("model.embed_tokens.weight").shard
    assert needs.of(architecture.blocks) == []
    shard_bytes = {
        shard: sum(
            e.size_bytes for e in checkpoint.tensors.values() if e.shard == shard
        )
        for shard in checkpoint.shards
    }
    assert made.source_disk_bytes < made.source_bytes
    assert made.source_disk_bytes >= 2 * min(shard_bytes.values())
    run_hub(hub, tmp_path / "out")
    assert made.source_disk_bytes >= hub.most * min(shard_bytes.values())
    all_of_it = plan_execution(
        checkpoint, architecture, plan, dataclasses.replace(options, evict_source=False)
    )
    assert all_of_it.source_disk_bytes == made.source_bytes


def test_a_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    message = (
        r"^--evict-source: .*toy is a folder, from which nothing is ever removed; "
    )
    with pytest.raises(UsageError, match=message):
        run_toy(hub.folder, tmp_path / "out", options={"evict_source": True}, **RUN)


def test_a_hub_without_hashes_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "tag", lambda name: f"git-{len(name)}")
    message = r"^--evict-source: the hub does not tell the sha256 of model-00001-of"
    with pytest.raises(UsageError, match=message):
        run_hub(hub, tmp_path / "out")
    assert hub.here() == []


def test_the_command_says_it(run: Run, hub: Hub) -> None:
    arguments = ("plan", ID, "--evict-source", "--method", "rtn", "--group-size", -1)
    code, said, _ = run(*arguments)
    assert code == 0
    assert "at a time, in the hub's cache" in said
    code, _, error = run(*arguments[:1], hub.folder, *arguments[2:])
    assert code == 1
    assert "is a folder" in error


def test_the_caches_disk_is_asked_for_the_shards(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those to be fetched; with --evict-source as many as lie there at a time."""
    checkpoint, plan, options, _ = planned(hub, tmp_path / "out")
    made = plan_execution(checkpoint, inspect_checkpoint(checkpoint), plan, options)
    own = made.output_bytes + made.small_bytes
    some = dataclasses.replace(options, evict_source=True)
    assert bytes_to_fetch(checkpoint, options) == made.source_bytes
    at_once = bytes_to_fetch(checkpoint, some)
    assert at_once < made.source_bytes

    def disk_usage(path: Path) -> SimpleNamespace:
        del path
        here = [*hub.place.rglob("*"), *tmp_path.glob("out*/**/*")]
        taken = sum(p.stat().st_size for p in here if p.is_file())
        return SimpleNamespace(free=own + at_once + 50_000 - taken)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    message = r"more bytes will be needed .* or give another .*, or --evict-source$"
    with pytest.raises(ScratchError, match=message):
        run_hub(hub, tmp_path / "out", evict_source=False)
    assert hub.shards() == []
    run_hub(hub, tmp_path / "out")
    for shard in checkpoint.shards:
        hub.download(ID, shard, revision=None)
    assert bytes_to_fetch(checkpoint, options) == 0
    assert bytes_to_fetch(open_toy(hub.folder), options) == 0
