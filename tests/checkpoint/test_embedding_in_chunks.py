"""Embedding and head in chunks of rows: the same bytes, and memory that stays flat."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsq_stream.checkpoint import source
from rsq_stream.checkpoint.formats._safetensors import lay_out
from rsq_stream.checkpoint.formats.base import OutputTensor
from rsq_stream.checkpoint.shards import SINGLE, Checkpoint
from rsq_stream.checkpoint.source import CHUNK_BYTES, chunk_rows
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import CheckpointError, DamagedError, Interrupted, OutputError
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD
from rsq_stream.output.shard_writer import ShardWriter
from rsq_stream.planning.execution_plan import plan_execution
from rsq_stream.planning.validate import inspect_checkpoint
from rsq_stream.storage import crash_points
from tests.support.toy import (
    contents,
    open_toy,
    options_for,
    plan_toy,
    read_json,
    run_toy,
    toy_checkpoint,
    toy_windows,
)

ROOT = Path(__file__).resolve().parents[2]
RUN: dict[str, Any] = {"samples": 2, "sequence_length": 16, "clip_steps": 4}
TOY: dict[str, Any] = {
    "width": 64,
    "heads": 2,
    "kv_heads": 1,
    "mlp": 44,
    "vocabulary": 137,
    "blocks": 1,
    "straddle": False,
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 rows, whatever the width: four of a toy's vocabulary, and 9 rows."""
    monkeypatch.setattr(source, "CHUNK_BYTES", 1)


def test_a_chunk_is_whole_words_of_codes_and_of_a_fixed_size() -> None:
    assert chunk_rows(8192) * 8192 * 4 == CHUNK_BYTES
    assert chunk_rows(16384) == 256
    assert chunk_rows(64) == 8192
    for width in (1, 56, 96, 172, 5120, 14336, 10**9):
        rows = chunk_rows(width)
        assert rows % 32 == 0
        assert rows == 32 or 4 * rows * width <= CHUNK_BYTES


@pytest.mark.parametrize(
    "settings",
    [
        {"head_bits": 3, "symmetric": False, "propagate": 0.5},
        {"head_bits": 8, "group_size": -1, "method": "rtn"},
        {"rotation": "none"},
        {"head_bits": 4, "grid": "nf"},
    ],
    ids=["asymmetric", "rows", "unrotated", "nf"],
)
@pytest.mark.parametrize(
    "model",
    [{"dtype": torch.bfloat16, "tied": True}, {}, {"width": 56, "family": "qwen2"}],
    ids=["tied", "untied", "width 56"],
)
def test_chunks_decide_no_byte(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    if settings.get("rotation") or settings.get("method"):
        model = model | {"tied": False}  # else it stays so, and there is no head
    if model.get("width") == 56:
        settings = settings | {"group_size": -1}
    folder = toy_checkpoint(tmp_path / "toy", **TOY | model)
    run_toy(folder, tmp_path / "whole", **RUN | settings)
    read: list[int] = []
    in_chunks = Checkpoint.read_chunks

    def counted(self: Checkpoint, name: str, rows: int) -> Any:
        for chunk in in_chunks(self, name, rows):
            read.append(len(chunk))
            yield chunk

    monkeypatch.setattr(Checkpoint, "read_chunks", counted)
    monkeypatch.setattr(source, "CHUNK_BYTES", 1)
    run_toy(folder, tmp_path / "chunks", **RUN | settings)
    assert read == [32, 32, 32, 32, 9] * 2
    assert contents(tmp_path / "chunks") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_chunks")
def test_a_stop_or_a_kill_between_chunks_goes_on_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    folder = toy_checkpoint(tmp_path / "toy", **TOY)
    run_toy(folder, tmp_path / "whole", head_bits=3, **RUN)
    for at in (3, 9, 16):  # twice in the head, once in the embedding
        for error in (Interrupted, KeyboardInterrupt):
            stop, output = threading.Event(), tmp_path / f"{error.__name__}{at}"
            wrote: list[Path] = []

            def strike(
                when: str,
                kind: str,
                paths: tuple[Path, ...],
                at: int = at,
                wrote: list[Path] = wrote,
                end: Callable[[], None] = (
                    stop.set if error is Interrupted else _interrupt
                ),
            ) -> None:
                if (when, kind) == ("after", "write") and "model-" in paths[0].name:
                    wrote.append(paths[0])
                    if len(wrote) == at:
                        end()

            with crash_points.observing(strike), pytest.raises(error):
                run_toy(folder, output, stop=stop, head_bits=3, **RUN)
            assert len(wrote) == at
            assert run_toy(folder, output, head_bits=3, **RUN).resumed_at == 0
            assert contents(output) == contents(tmp_path / "whole")


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("small_chunks")
def test_a_late_chunk_with_infinity_is_refused(tmp_path: Path) -> None:
    folder = toy_checkpoint(tmp_path / "toy", **TOY)
    shard = folder / open_toy(folder).entry(EMBEDDING).shard
    entry = open_toy(folder).entry(EMBEDDING)
    with shard.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start + entry.offset + entry.size_bytes - 4)
        file.write(torch.tensor(torch.inf).numpy().tobytes())
    with pytest.raises(CheckpointError, match=rf"{EMBEDDING} holds NaN or infinity"):
        run_toy(folder, tmp_path / "out", **RUN)


def test_rows_and_chunks_are_those_of_the_whole(tmp_path: Path) -> None:
    checkpoint = open_toy(toy_checkpoint(tmp_path / "toy", **TOY))
    whole_VD = checkpoint.read(LM_HEAD)
    chunks = list(checkpoint.read_chunks(LM_HEAD, 50))
    assert [len(chunk) for chunk in chunks] == [50, 50, 37]
    assert torch.equal(torch.cat(chunks), whole_VD)
    assert torch.equal(torch.cat(list(checkpoint.read_chunks(LM_HEAD, 999))), whole_VD)
    index_N = torch.tensor([136, 0, 7, 7])
    assert torch.equal(checkpoint.read_rows(LM_HEAD, index_N), whole_VD[index_N])
    assert torch.equal(
        torch.cat(list(checkpoint.read_chunks(FINAL_NORM, 7))),
        checkpoint.read(FINAL_NORM),
    )


def _writer(folder: Path, *tensors: tuple[str, Tensor]) -> ShardWriter:
    announced = [
        OutputTensor(name, made.dtype, tuple(made.shape)) for name, made in tensors
    ]
    return ShardWriter(folder, lay_out(announced, 10**6), {})


def test_a_tensor_in_chunks_is_written_once_all_its_rows_are(tmp_path: Path) -> None:
    a_VD, b_V = torch.randn(10, 3).bfloat16(), torch.arange(10)
    made = _writer(tmp_path, ("a", a_VD), ("b", b_V))
    with pytest.raises(OutputError, match=r"^a: 24 bytes came, 60 belong there$"):
        made.write_chunks([{"a": a_VD[:4]}])
    assert made.checksums == {}
    for wrong in (a_VD[:, :2], a_VD.half(), torch.cat([a_VD, a_VD])):
        with pytest.raises(OutputError, match=r"^a: .* was to be written where"):
            made.write_chunks([{"a": wrong}])
    parts = zip(a_VD.split(4), b_V.split(4), strict=True)
    made.write_chunks([{"a": a, "b": b} for a, b in parts])
    whole = _writer(tmp_path / "..", ("a", a_VD))
    whole.close()
    assert torch.equal(made.read("a"), a_VD)
    assert torch.equal(made.read("b"), b_V)
    rows_N = torch.tensor([9, 2])
    assert torch.equal(made.read_rows("a", rows_N), a_VD[rows_N])
    at_once = _writer(tmp_path / "again", ("a", a_VD))
    (tmp_path / "again").mkdir()
    at_once.write("a", a_VD)
    assert at_once.checksums["a"] == made.checksums["a"]
    (layout,) = made.full_shards()
    made.finish(layout)
    assert torch.equal(made.read_rows("a", rows_N), a_VD[rows_N])
    at_once.close()
    path = tmp_path / layout.name
    content = bytearray(path.read_bytes())
    content[layout.places["a"][0] + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"a is not what was written"):
        made.require_tensor("a")


FEW_WORDS, VOCABULARY, WIDTH = 4096, 60_000, 512
"""Even the few are eight chunks, so that both take what whole chunks do."""


def child() -> None:
    """Quantize with a small vocabulary, then with a large one; says what that adds."""
    folder = Path(sys.argv[1])
    source.CHUNK_BYTES = 1 << 20
    peaks = []
    # The first run also loads and compiles; it says nothing.
    for number, name in enumerate(("small", "small", "large")):
        run_toy(folder / name, folder / f"out-{number}", head_bits=8, **RUN)
        status = Path("/proc/self/status").read_text()
        peaks.append(int(status.partition("VmHWM:")[2].split()[0]) << 10)
    sys.stdout.write(str(peaks[2] - peaks[1]))


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)
def test_memory_does_not_grow_with_the_vocabulary(disk_folder: Path) -> None:
    model = TOY | {"width": WIDTH, "tied": True, "shards": 1}
    toy = toy_checkpoint(disk_folder / "toy", **model)
    for name, words in (("small", FEW_WORDS), ("large", VOCABULARY)):
        made = Path(shutil.copytree(toy, disk_folder / name))
        config = read_json(made / "config.json") | {"vocab_size": words}
        (made / "config.json").write_text(json.dumps(config))
        tensors = load_file(made / SINGLE)
        tensors[EMBEDDING] = torch.randn(words, WIDTH)
        save_file(tensors, made / SINGLE)
    program = "from tests.checkpoint.test_embedding_in_chunks import child; child()"
    said = subprocess.run(
        [sys.executable, "-c", program, disk_folder],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    added_bytes = 4 * (VOCABULARY - FEW_WORDS) * WIDTH
    assert added_bytes > 110_000_000
    assert int(said) < 0.2 * added_bytes


def test_the_planner_counts_a_chunk_and_not_the_vocabulary(tmp_path: Path) -> None:
    checkpoint = open_toy(toy_checkpoint(tmp_path / "toy", **TOY))
    settings: dict[str, Any] = {"windows": toy_windows(137, 2, 16, 0), **RUN}
    kept, _ = plan_toy(tmp_path / "toy", **settings)
    rounded, _ = plan_toy(tmp_path / "toy", head_bits=4, **settings)
    once = inspect_checkpoint(checkpoint)
    options = options_for(tmp_path / "out")

    def needs(plan: QuantizationPlan, vocabulary: int) -> int:
        architecture = dataclasses.replace(once, vocabulary=vocabulary)
        return plan_execution(checkpoint, architecture, plan, options).working_bytes

    for plan in (kept, rounded):
        assert needs(plan, 8192) == needs(plan, 200_000) > needs(plan, 4096)
    assert needs(rounded, 8192) > needs(kept, 8192)
