"""Hub ids, with the hub played by a folder; and what is said when it is away."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from rsq_stream.calibration.text import read_text
from rsq_stream.checkpoint import files
from rsq_stream.checkpoint.files import open_files, read_header
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.errors import CalibrationError, CheckpointError
from tests.support.toy import toy_checkpoint


class _Hub:
    """A hub with one repository; counts what is fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []

    def download(self, repo: str, name: str, *, revision: str | None) -> str:
        assert (repo, revision) == ("owner/toy", "main")
        if not (self.folder / name).is_file():
            raise EntryNotFoundError(name)
        self.fetched.append(name)
        return str(self.folder / name)

    def parse_safetensors_file_metadata(
        self, repo: str, name: str, *, revision: str | None
    ) -> SimpleNamespace:
        assert (repo, revision) == ("owner/toy", "main")
        header = json.loads(read_header(self.folder / name, "hub")[0])
        header.pop("__metadata__", None)
        return SimpleNamespace(
            tensors={key: SimpleNamespace(**value) for key, value in header.items()}
        )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Hub:
    made = _Hub(toy_checkpoint(tmp_path / "toy"))
    monkeypatch.setattr(files, "hf_hub_download", made.download)
    monkeypatch.setattr(files, "HfApi", lambda: made)
    return made


def test_shards_are_fetched_only_when_a_tensor_is_read(hub: _Hub) -> None:
    checkpoint = Checkpoint(open_files("owner/toy", "main"))
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    local = Checkpoint(open_files(str(hub.folder)))
    assert checkpoint.headers_sha256 == local.headers_sha256
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(checkpoint.read(name), local.read(name))
    shards = {name for name in hub.fetched if name.endswith(".safetensors")}
    assert shards == {checkpoint.entry(name).shard}


def test_a_shard_that_is_not_what_the_plan_saw_is_refused(hub: _Hub) -> None:
    checkpoint = Checkpoint(open_files("owner/toy", "main"))
    other = toy_checkpoint(hub.folder.parent / "other", mlp=96)
    for path in other.glob("*.safetensors"):
        path.replace(hub.folder / path.name)
    with pytest.raises(CheckpointError, match="changed since the run began"):
        checkpoint.read("model.layers.0.mlp.up_proj.weight")


def test_away_and_unknown_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(files, "hf_hub_download", away)
    with pytest.raises(CheckpointError, match="the hub cannot be reached") as caught:
        Checkpoint(open_files("owner/toy"))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="not a hub id of the form owner/name"):
        open_files("no-such-folder")


def test_data_sets_offline_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("rsq_stream.calibration.text.hf_hub_download", away)
    with pytest.raises(CalibrationError, match="--calibration FILE"):
        read_text("wikitext2", 0)
