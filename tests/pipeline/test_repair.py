"""Damaged state is noticed before it is used, and made again where that is possible."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsq_stream.checkpoint.shards import parse_header
from rsq_stream.errors import DamagedError, Interrupted, OutputError
from rsq_stream.events import BlockFinished, Event, Notice, StageStarted
from tests.pipeline.test_resume import SMALL
from tests.support.toy import Recorder, contents, run_toy, toy_checkpoint

RUN: dict[str, Any] = {
    "sequence_length": 16,
    "clip_steps": 4,
    "propagate": 0.5,
    "plan": {"shard_bytes": 1 << 20},
    "execution": {"in_flight": 3, "resident_units": 1},
}
STAGES = ("attention in", "attention out", "mlp in", "mlp out", "outputs")
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(
        tmp_path_factory.mktemp("rebuild") / "toy", blocks=3, straddle=False, **SMALL
    )


@pytest.fixture(scope="module")
def whole(toy: Path) -> Files:
    run_toy(toy, toy.with_name("whole"), **RUN)
    return contents(toy.with_name("whole"))


def began(event: Event, block: int, stage: str) -> bool:
    return isinstance(event, StageStarted) and (event.block, event.stage) == (
        block,
        stage,
    )


def stopped(toy: Path, output: Path, block: int, stage: str, **settings: Any) -> None:
    """Leave a run behind that was stopped when a stage of a block began."""
    stop = threading.Event()

    def listener(event: Event) -> None:
        if began(event, block, stage):
            stop.set()

    with pytest.raises(Interrupted):
        run_toy(toy, output, listener=listener, stop=stop, **RUN | settings)


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def place_of(partial: Path, name: str) -> int:
    """Return where a tensor begins in a shard."""
    raw = partial.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = parse_header(raw[8 : 8 + length], "x", len(raw) - 8 - length, "here")
    return next(8 + length + e.offset for e in entries if e.name == name)


def goes_on(toy: Path, output: Path, **settings: Any) -> list[str]:
    """Resume; gives the notices of what was made again."""
    recorder = Recorder()
    run_toy(toy, output, listener=recorder, **RUN | settings)
    return [
        event.text
        for event in recorder.events
        if isinstance(event, Notice) and "made again" in event.text
    ]


@pytest.mark.parametrize(
    ("shard_bytes", "block", "name"),
    [
        (1 << 20, 2, "model.norm.weight"),
        (1 << 20, 2, "model.layers.2.input_layernorm.weight"),
        (9_000, 0, "model.layers.0.input_layernorm.weight"),
        (9_000, 1, "model.layers.1.post_attention_layernorm.weight"),
    ],
)
def test_a_shard_damaged_before_it_is_named_repeats_no_block(
    toy: Path, tmp_path: Path, shard_bytes: int, block: int, name: str
) -> None:
    """Its last block is journalled by then: what is done again is the naming alone."""
    parts = {"plan": {"shard_bytes": shard_bytes}}
    run_toy(toy, tmp_path / "whole", **RUN | parts)
    output, recorder = tmp_path / "out", Recorder()

    def listener(event: Event) -> None:
        recorder(event)
        if isinstance(event, BlockFinished) and event.block == block:
            _flip_in_place(output, name)

    run_toy(toy, output, listener=listener, **RUN | parts)
    said = [event.text for event in recorder.events if isinstance(event, Notice)]
    assert sum("made again from the source" in text for text in said) == 1
    finished = [e.block for e in recorder.events if isinstance(e, BlockFinished)]
    assert finished == [0, 1, 2]
    assert contents(output) == contents(tmp_path / "whole")


def _flip_in_place(output: Path, name: str) -> None:
    for partial in output.glob("*.safetensors.partial"):
        if name.encode() not in partial.read_bytes():
            continue
        with partial.open("r+b") as file:
            place = place_of(partial, name)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 4]))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [flip, _cut, Path.unlink])
@pytest.mark.parametrize(
    ("block", "stage", "part", "origin"),
    [
        (0, "attention out", "even/c.1.0.0", "the calibration windows"),
        (1, "attention in", "odd/c.1.0.0", "the input of block 0"),
        (1, "mlp in", "odd/c.0.0.0", "the input of block 0"),
        (2, "attention out", "even/zarr.json", "the input of block 1"),
        (0, "mlp in", "full-even/c.1.0.0", "the calibration windows"),
        (2, "attention in", "full-even/c.1.0.0", "the input of block 1"),
        (1, "mlp out", "full-h/c.1.0.0", "the block's input"),
        (2, "mlp in", "h/c.1.0.0", ""),  # about to be written over
        (1, "outputs", "even/c.2.0.0", ""),
        (1, "outputs", "even/zarr.json", ""),
        (1, "mlp out", "h/c.1.0.0", "the block's input"),
        (2, "outputs", "h/zarr.json", "the block's input"),
        (1, "mlp in", "token-weights.safetensors", "the block's input"),
    ],
)
def test_work_files_are_made_again(
    toy: Path,
    whole: Files,
    tmp_path: Path,
    block: int,
    stage: str,
    part: str,
    origin: str,
    harm: Callable[[Path], None],
) -> None:
    output = tmp_path / "out"
    stopped(toy, output, block, stage)
    harm(tmp_path / "out.work" / part)
    notices = goes_on(toy, output)
    if part.endswith("zarr.json"):
        # Made anew where it is gone; with a flipped last byte it may open all the same.
        assert len(notices) <= 1
    elif not origin:
        assert notices == []
    else:
        (notice,) = notices
        assert str(tmp_path / "out.work" / part.split("/")[0]) in notice
        assert notice.endswith(f"; made again from {origin}")
    assert contents(output) == whole
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("stage", "linear", "again"),
    [
        ("attention out", "self_attn.k_proj.weight_packed", "attention in"),
        ("mlp out", "self_attn.o_proj.weight_scale", "attention out"),
        ("outputs", "mlp.down_proj.weight_packed", "mlp out"),
    ],
)
def test_codes_of_the_unfinished_block_are_solved_again(
    toy: Path, whole: Files, tmp_path: Path, stage: str, linear: str, again: str
) -> None:
    output = tmp_path / "out"
    stopped(toy, output, 1, stage)
    (partial,) = output.glob("*.partial")
    name = f"model.layers.1.{linear}"
    flip(partial, place_of(partial, name))
    (notice,) = goes_on(toy, output)
    assert f"{partial}: {name} is not what was written" in notice
    assert notice.endswith(f"from stage {again} on")
    assert contents(output) == whole


def test_what_the_source_has_is_read_from_it_again(
    toy: Path, whole: Files, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stopped(toy, output, 1, "mlp in")
    (partial,) = output.glob("*.partial")
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
    ):
        flip(partial, place_of(partial, name))
    assert len(goes_on(toy, output)) == 4
    assert contents(output) == whole


def test_codes_of_finished_blocks_are_refused_at_once(
    toy: Path, whole: Files, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stopped(toy, output, 2, "attention in")
    (partial,) = output.glob("*.partial")
    name = "model.layers.0.mlp.up_proj.weight_packed"
    place = place_of(partial, name)
    flip(partial, place)
    recorder = Recorder()
    message = rf"{partial}: {name} is not what was written; .*--restart"
    with pytest.raises(DamagedError, match=message):
        run_toy(toy, output, listener=recorder, **RUN)
    assert not [e for e in recorder.events if isinstance(e, StageStarted)]
    flip(partial, place)  # put back, the run goes on
    assert goes_on(toy, output) == []
    assert contents(output) == whole


def test_rounding_alone_makes_any_block_again(toy: Path, tmp_path: Path) -> None:
    run_toy(toy, tmp_path / "whole", method="rtn", **RUN)
    output, stop = tmp_path / "out", threading.Event()

    def listener(event: Event) -> None:
        if type(event).__name__ == "BlockFinished":
            stop.set()

    with pytest.raises(Interrupted):
        run_toy(toy, output, method="rtn", listener=listener, stop=stop, **RUN)
    (partial,) = output.glob("*.partial")
    flip(partial, place_of(partial, "model.layers.0.mlp.up_proj.weight_packed"))
    assert len(goes_on(toy, output, method="rtn")) == 1
    assert contents(output) == contents(tmp_path / "whole")


def test_without_its_own_input_a_block_is_refused(toy: Path, tmp_path: Path) -> None:
    output, work = tmp_path / "out", tmp_path / "out.work"
    stopped(toy, output, 1, "attention out")
    flip(work / "odd" / "c.1.0.0")
    flip(work / "even" / "c.0.0.0")
    message = rf"^{work}/odd/c.1.0.0: the stored activations are damaged or missing;"
    with pytest.raises(DamagedError, match=message):
        run_toy(toy, output, **RUN)


def test_a_finished_shard_is_read_once_more_before_the_seal(
    toy: Path, tmp_path: Path
) -> None:
    output, small = tmp_path / "out", {"plan": {"shard_bytes": 9_000}}
    stopped(toy, output, 2, "outputs", **small)
    shard = sorted(output.glob("*.safetensors"))[0]
    flip(shard)
    with pytest.raises(OutputError, match=rf"^{shard}: is gone or not what was"):
        run_toy(toy, output, **RUN | small)
    assert not (output / "rsq_stream.json").exists()


def test_damage_in_the_midst_of_a_run_is_made_good(
    toy: Path, whole: Files, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done: list[Event] = []

    def listener(event: Event) -> None:
        if began(event, 2, "attention out") and not done:
            flip(tmp_path / "out.work" / "even" / "c.1.0.0")
            done.append(event)

    run_toy(toy, output, listener=listener, **RUN)
    assert done
    assert contents(output) == whole
