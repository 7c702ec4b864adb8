"""``verify`` finds what is damaged, missing, extra, or not the source's."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsq_stream.errors import CheckpointError, OutputError
from rsq_stream.output.verify import verify
from tests.support.toy import linear_names, open_toy, run_toy, toy_checkpoint


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("verify") / "toy")


@pytest.fixture(scope="module")
def sound(toy: Path) -> Path:
    run_toy(toy, toy.with_name("out"))
    return toy.with_name("out")


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def test_a_sound_output_has_no_problems(toy: Path, sound: Path) -> None:
    found = verify(sound, open_toy(toy))
    assert found.problems == []
    assert found.files == len(list(sound.iterdir()))
    assert found.bytes == sum(path.stat().st_size for path in sound.iterdir())
    assert list(found.weight_errors) == linear_names(2)
    assert all(0 < error < 1 for error in found.weight_errors.values())


def test_any_flipped_bit_is_found(sound: Path, copy: Path) -> None:
    chooser = random.Random(0)
    names = sorted(path.name for path in sound.iterdir())
    for turn in range(200):
        path = copy / (names[turn] if turn < len(names) else chooser.choice(names))
        content = bytearray(path.read_bytes())
        place = chooser.randrange(len(content))
        content[place] ^= 1 << chooser.randrange(8)
        path.write_bytes(content)
        assert verify(copy).problems, f"{path.name}, byte {place}"
        path.write_bytes((sound / path.name).read_bytes())
    assert verify(copy).problems == []


def resealed(folder: Path) -> None:
    """Make manifest and seal agree with what is there, as a careless tool would."""
    manifest = json.loads((folder / "rsq_stream.json").read_bytes())
    manifest["files"] = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
        if not path.name.startswith("rsq_stream.")
    }
    content = json.dumps(manifest).encode()
    (folder / "rsq_stream.json").write_bytes(content)
    seal = f"{hashlib.sha256(content).hexdigest()}  rsq_stream.json\n"
    (folder / "rsq_stream.sha256").write_text(seal)


@pytest.mark.parametrize("how", ["missing", "full", "both", "another type"])
def test_a_tensor_that_does_not_belong_is_found(copy: Path, how: str) -> None:
    name = "model.layers.1.mlp.up_proj"
    (shard,) = [
        path
        for path in copy.glob("*.safetensors")
        if f"{name}.weight_packed".encode() in path.read_bytes()
    ]
    tensors = load_file(shard)
    if how in ("missing", "full"):
        del tensors[f"{name}.weight_packed"]
    if how in ("full", "both"):
        tensors[f"{name}.weight"] = torch.zeros(172, 96)
    if how == "another type":
        packed = f"{name}.weight_packed"
        tensors[packed] = tensors[packed].long()
    save_file(tensors, shard)
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_bytes())
    places = {n: s for n, s in content["weight_map"].items() if s != shard.name}
    content["weight_map"] = places | dict.fromkeys(tensors, shard.name)
    index.write_text(json.dumps(content))
    resealed(copy)
    said = " ".join(verify(copy).problems)
    wanted = {
        "missing": f"{name}.weight_packed is missing",
        "full": f"{name}.weight does not belong here",
        "both": f"{name}.weight does not belong here",
        "another type": f"{name}.weight_packed is torch.int64",
    }
    assert wanted[how] in said


def test_missing_and_extra_files_are_found(copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "extra.bin").write_bytes(b"x")
    problems = " ".join(verify(copy).problems)
    assert "config.json: is missing" in problems
    assert "extra.bin: is not part of this output" in problems


def test_what_is_no_output_is_refused(tmp_path: Path, sound: Path) -> None:
    with pytest.raises(OutputError, match="no finished output"):
        verify(tmp_path)
    other = toy_checkpoint(tmp_path / "other", mlp=96)
    with pytest.raises(CheckpointError, match="is not the source of"):
        verify(sound, open_toy(other))


def test_a_manifest_that_says_otherwise_is_found(copy: Path) -> None:
    manifest = json.loads((copy / "rsq_stream.json").read_bytes())
    manifest["plan"]["bits"] = 4
    (copy / "rsq_stream.json").write_text(json.dumps(manifest))
    assert "does not match" in verify(copy).problems[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance": "last-n"}, "--importance must be one of actdiff, actnorm, "),
        ({"importance": "chunks"}, "--importance-chunks must be C,C,.../T with C "),
    ],
    ids=["name", "chunks"],
)
def test_a_plan_of_no_strategy_is_one_problem(
    copy: Path, changes: dict[str, str], message: str
) -> None:
    manifest = json.loads((copy / "rsq_stream.json").read_bytes())
    manifest["plan"] |= changes
    (copy / "rsq_stream.json").write_text(json.dumps(manifest))
    resealed(copy)
    (problem,) = verify(copy).problems
    assert problem.startswith(f"{copy}: {message}")
