"""Linears with bits of their own: patterns, kept linears, the head, crashes."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rsq_stream.config.overrides import Override, parse_override, resolve
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import Interrupted, UsageError
from rsq_stream.events import Event, StageStarted
from rsq_stream.model.tensor_names import block_of
from rsq_stream.output.verify import verify
from tests.pipeline.test_repair import RUN, flip, goes_on, place_of, stopped
from tests.pipeline.test_resume import SMALL
from tests.support.toy import (
    contents,
    decoded_state,
    linear_names,
    open_toy,
    run_toy,
    toy_checkpoint,
)

NAMES: dict[str, int | None] = {name: block_of(name) for name in linear_names(3)}
NAMES["lm_head"] = None
OWN: dict[str, Any] = {
    "overrides": ("*@1=4", "v_proj=16", "down_proj@0=16", "model.layers.1.mlp.*=2g-1"),
    "head_bits": 8,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("own") / "toy", **SMALL)


@pytest.fixture(scope="module")
def whole(toy: Path) -> dict[str, bytes]:
    run_toy(toy, toy.with_name("whole"), **RUN | OWN)
    return contents(toy.with_name("whole"))


@pytest.mark.parametrize(
    ("text", "name", "override"),
    [
        ("down_proj=4g64", "down_proj", Override(4, 64)),
        ("*.v_proj@0-3=16", "*.v_proj@0-3", Override(16)),
        ("lm_head=8", "lm_head", Override(8)),
        ("x=2g-1", "x", Override(2, -1)),
    ],
)
def test_a_line_and_back(text: str, name: str, override: Override) -> None:
    assert parse_override(text) == (name, override)
    assert f"{name}={override}" == text


@pytest.mark.parametrize(
    "text",
    ["", "x", "x=", "=3", "x=1", "x=9", "x=15", "x=16g64", "x=3g63", "x=3g", "a=b=3"],
)
def test_malformed_lines_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be PATTERN=BITS") as caught:
        parse_override(text)
    assert str(caught.value).endswith(f", not {text}")


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [
        ("down_proj", [f"model.layers.{n}.mlp.down_proj" for n in range(3)]),
        ("mlp.down_proj@1", ["model.layers.1.mlp.down_proj"]),
        ("*proj@2", [n for n in NAMES if ".2." in n]),
        ("v_proj@1-7", [f"model.layers.{n}.self_attn.v_proj" for n in (1, 2)]),
        ("*", [n for n in NAMES if n != "lm_head"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_patterns(pattern: str, fitting: list[str]) -> None:
    assert list(resolve("override", [(pattern, 5)], NAMES)) == fitting


@pytest.mark.parametrize("pattern", ["downproj", "v_proj@3", "@1", "lm_head@0", "v@0-"])
def test_a_pattern_that_fits_nothing_is_a_typo(pattern: str) -> None:
    with pytest.raises(UsageError, match="no linear of this model fits") as caught:
        resolve("override", [(pattern, 5)], NAMES)
    assert "there are q_proj, k_proj, v_proj, o_proj" in str(caught.value)


def test_the_last_one_wins() -> None:
    found = resolve(
        "override",
        map(parse_override, ["*=3", "v_proj=16", "v_proj@1=4g64"]),
        NAMES,
    )
    own = [found[f"model.layers.{n}.self_attn.v_proj"] for n in range(3)]
    assert own == [Override(16), Override(4, 64), Override(16)]


def test_each_linear_is_stored_as_it_was_asked_for(
    toy: Path, whole: dict[str, bytes]
) -> None:
    output = toy.with_name("whole")
    assert not verify(output, open_toy(toy)).problems
    source, found = open_toy(toy), decoded_state(output)
    checkpoint = open_toy(output)
    for name in linear_names(2):
        kept = "v_proj" in name or name == "model.layers.0.mlp.down_proj"
        kept &= not name.startswith("model.layers.1.mlp")
        assert (f"{name}.weight" in checkpoint.tensors) == kept
    # The kept ones are the source's, rotated: as close as their type.
    run_toy(toy, toy.with_name("eight"), **RUN | {"bits": 8})
    close = decoded_state(toy.with_name("eight"))
    for name in ("model.layers.0.self_attn.v_proj", "lm_head"):
        error = (found[f"{name}.weight"] - close[f"{name}.weight"]).abs().max()
        assert error < 0.02 * close[f"{name}.weight"].abs().max()
    assert source.tensors["lm_head.weight"].shape == found["lm_head.weight"].shape
    assert "lm_head.weight_packed" in checkpoint.tensors


def test_what_is_as_usual_is_not_in_the_plan(toy: Path) -> None:
    from tests.support.toy import plan_toy

    made, _ = plan_toy(toy, overrides=("q_proj=3", "o_proj@0=3g32", "lm_head=16"))
    # A group of its own is one, even where it is the plan's.
    assert made.overrides == ("model.layers.0.self_attn.o_proj=3g32",)
    name = "model.layers.0.self_attn.o_proj"
    assert made.scheme(name, 64) == Scheme(3, 32, symmetric=True)
    assert made.scheme(name, 48) == Scheme(3, -1, symmetric=True)
    assert made.scheme("lm_head", 64) is None


def test_bits_of_its_own_are_solved_as_if_all_had_them(
    toy: Path, tmp_path: Path
) -> None:
    """The first stage sees nothing of the others: its codes are those of 4 bits."""
    run_toy(toy, tmp_path / "four", **RUN | {"bits": 4})
    run_toy(toy, tmp_path / "own", **RUN | {"bits": 3, "overrides": ("*_proj@0=4",)})
    four, own = decoded_state(tmp_path / "four"), decoded_state(tmp_path / "own")
    for name in linear_names(1):
        assert torch.equal(own[f"{name}.weight"], four[f"{name}.weight"])


@pytest.mark.parametrize("stage", ["attention out", "mlp in", "outputs"])
@pytest.mark.parametrize("block", [0, 1])
def test_stopped_anywhere_it_goes_on(
    toy: Path, whole: dict[str, bytes], tmp_path: Path, block: int, stage: str
) -> None:
    stop = threading.Event()

    def listener(event: Event) -> None:
        if isinstance(event, StageStarted) and (event.block, event.stage) == (
            block,
            stage,
        ):
            stop.set()

    with pytest.raises(Interrupted):
        run_toy(toy, tmp_path / "out", listener=listener, stop=stop, **RUN | OWN)
    run_toy(toy, tmp_path / "out", **RUN | OWN)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "part",
    [
        "lm_head.weight_packed",
        "lm_head.weight_scale",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ],
)
def test_damage_is_made_good(
    toy: Path, whole: dict[str, bytes], tmp_path: Path, part: str
) -> None:
    output = tmp_path / "out"
    settings = OWN
    run_toy(toy, tmp_path / "whole", **RUN | settings)
    stopped(toy, output, 1, "mlp in", **settings)
    (partial,) = output.glob("*.partial")
    flip(partial, place_of(partial, part))
    (notice,) = goes_on(toy, output, **settings)
    assert part in notice
    assert contents(output) == contents(tmp_path / "whole")


def test_all_of_a_stage_may_be_kept(toy: Path, tmp_path: Path) -> None:
    own = ("q_proj=16", "k_proj=16", "v_proj=16", "gate_proj=16", "up_proj=16")
    for propagate in (0.0, 0.5):
        output = tmp_path / str(propagate)
        summary = run_toy(
            toy, output, **RUN | {"overrides": own, "propagate": propagate}
        )
        assert {made.name.rpartition(".")[2] for made in summary.records} == {
            "o_proj",
            "down_proj",
        }
        assert not verify(output, open_toy(toy)).problems


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_bits": 9}, "--head-bits must be 2 to 8 or 16, not 9"),
        ({"overrides": ("x=3",)}, "--override x=3: no linear of this model fits x"),
        (
            {"overrides": ("v_proj=3g64",), "act_order": True},
            "--act-order must be off where linears have their own groups, not on",
        ),
    ],
)
def test_refusals(toy: Path, settings: dict[str, Any], message: str) -> None:
    from tests.support.toy import plan_toy

    with pytest.raises(UsageError, match=message):
        plan_toy(toy, **settings)


def test_a_tied_head_cannot_have_its_own(tmp_path: Path) -> None:
    from tests.support.toy import plan_toy

    toy = toy_checkpoint(tmp_path / "toy", **SMALL | {"tied": True})
    with pytest.raises(UsageError, match="is its embedding, and without a rotation"):
        plan_toy(toy, method="gptq", head_bits=8)
    with pytest.raises(UsageError, match="no linear of this model fits lm_head"):
        plan_toy(toy, method="gptq", overrides=("lm_head=8",))
    made, _ = plan_toy(toy, method="rsq", head_bits=8)
    assert made.overrides == ("lm_head=8",)
