"""A model as it is served: evaluated so, and calibrated on what it then sees."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rsq_stream.algorithm.gptq import error_propagation
from rsq_stream.algorithm.gptq.ldl import factorise
from rsq_stream.checkpoint.manifest import served_rounding
from rsq_stream.checkpoint.model_reader import ModelReader
from rsq_stream.config.activations import NOTHING, ActivationRounding
from rsq_stream.errors import Interrupted, OutputError, PlanMismatchError, UsageError
from rsq_stream.evaluation import perplexity
from rsq_stream.evaluation.generation import greedy_sample
from rsq_stream.evaluation.perplexity import evaluate
from rsq_stream.events import Event, StageStarted
from rsq_stream.pipeline import block_solver
from rsq_stream.pipeline.bit_allocation.measure import sensitivity_plan
from tests.support.cli_runs import Run
from tests.support.textbook import token_weights
from tests.support.textbook_activations import Served, serving
from tests.support.toy import (
    calm,
    contents,
    decoded_state,
    linear_names,
    open_toy,
    plan_toy,
    run_toy,
    toy_checkpoint,
    toy_tokenizer,
    toy_windows,
)

WINDOWS = toy_windows(128, 3, 31, 3).window_BT
W4A4KV4: dict[str, Any] = {"activation_bits": 4, "kv_bits": 4}
CLIPPED = W4A4KV4 | {"activation_clip": 0.9, "kv_clip": 0.95}
ASYMMETRIC: dict[str, Any] = {
    "activation_bits": 5,
    "activation_group_size": 48,
    "activation_symmetric": False,
    "kv_bits": 3,
    "kv_symmetric": False,
}
SMOOTH: dict[str, Any] = {
    "activation_bits": 8,
    "activation_clip": 0.5,
    "kv_bits": 8,
    "kv_clip": 0.5,
}
"""Changes as much, but continuously: in fp32 a value at the edge of two levels may fall
to either side, and of 4 bits all that follows would show it."""


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with calm():
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "toy"
    toy_checkpoint(folder, mlp=192)
    toy_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def served(toy: Path) -> Path:
    """A toy calibrated as served, with error propagation, sweeps and refit."""
    run_toy(toy, toy.with_name("served"), **SERVED_RUN)
    return toy.with_name("served")


SERVED_RUN: dict[str, Any] = W4A4KV4 | {
    "bits": 4,
    "propagate": 0.5,
    "sweeps": 1,
    "refit": True,
}


class InFloat64(ModelReader):
    """Computes so finely that no value falls to the other side of an edge."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.compute_type = torch.float64


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "ModelReader", InFloat64)


def transformers_model(
    folder: Path,
    state: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if state is not None:
        model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def loss_of(model: Any, window_BT: Tensor, scheme: dict[str, Any]) -> float:
    with serving(model, Served(**scheme)):
        logits_BTV = model(window_BT, use_cache=False).logits[:, :-1].double()
    log_BTV = logits_BTV.log_softmax(-1)
    return float(-log_BTV.gather(2, window_BT[:, 1:, None]).mean())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("scheme", [W4A4KV4, CLIPPED, ASYMMETRIC, {"kv_bits": 2}])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_perplexity_is_that_of_transformers_with_hooks(
    tmp_path: Path, family: str, scheme: dict[str, Any]
) -> None:
    folder = toy_checkpoint(tmp_path / "toy", family=family, mlp=192)
    model = transformers_model(folder, dtype=torch.float64)
    found = evaluate(
        open_toy(folder), WINDOWS, scheme=ActivationRounding(**scheme)
    ).loss
    expected = loss_of(model, WINDOWS, scheme)
    assert found == pytest.approx(expected, rel=1e-6)
    plain = loss_of(model, WINDOWS, {})
    assert evaluate(open_toy(folder), WINDOWS).loss == pytest.approx(plain, rel=1e-6)
    assert abs(plain / expected - 1) > 1e-5


@pytest.mark.usefixtures("in_float64")
def test_a_folder_is_evaluated_as_it_was_calibrated(toy: Path, served: Path) -> None:
    scheme = ActivationRounding(**W4A4KV4)
    assert served_rounding(open_toy(served)) == scheme
    assert served_rounding(open_toy(toy)) == NOTHING
    made = evaluate(open_toy(served), WINDOWS, against=open_toy(toy))
    named = evaluate(open_toy(served), WINDOWS, scheme=scheme)
    plain = evaluate(open_toy(served), WINDOWS, scheme=NOTHING)
    assert made.loss == named.loss != plain.loss
    model = transformers_model(toy, decoded_state(served), torch.float64)
    assert made.loss == pytest.approx(loss_of(model, WINDOWS, W4A4KV4), rel=1e-6)
    assert plain.loss == pytest.approx(loss_of(model, WINDOWS, {}), rel=1e-6)
    # The other model is served as its own folder says.
    source = evaluate(open_toy(toy), WINDOWS)
    assert made.against_perplexity == source.perplexity
    turned = evaluate(open_toy(toy), WINDOWS, against=open_toy(served))
    assert turned.against_perplexity == made.perplexity
    assert turned.perplexity == source.perplexity


def test_an_older_output_and_a_damaged_one(served: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(served, tmp_path / "copy"))
    path = folder / "rsq_stream.json"
    manifest = json.loads(path.read_text())
    older = {k: v for k, v in manifest["plan"].items() if k not in SCHEME_FIELDS}
    path.write_text(json.dumps({"plan": older}))
    assert served_rounding(open_toy(folder)) == NOTHING
    for content in ("{", "[]", "{}", '{"plan": 3}', '{"plan": {"kv_bits": 1}}'):
        path.write_text(content)
        with pytest.raises(OutputError, match=r"rsq_stream.json: does not say how"):
            evaluate(open_toy(folder), WINDOWS)


SCHEME_FIELDS = [field.name for field in dataclasses.fields(ActivationRounding)]


def test_samples_round_what_evaluation_does(toy: Path, served: Path) -> None:
    model, tokenizer = transformers_model(toy), toy_tokenizer()
    ids = tokenizer("Once upon")["input_ids"]
    with serving(model, Served(**SMOOTH)), torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    scheme = ActivationRounding(**SMOOTH)
    found = greedy_sample(open_toy(toy), "Once upon", 8, scheme=scheme)
    assert found == expected != greedy_sample(open_toy(toy), "Once upon", 8)
    # By default what the folder was calibrated for.
    own = greedy_sample(open_toy(served), "Once upon", 8)
    scheme = ActivationRounding(**W4A4KV4)
    assert own == greedy_sample(open_toy(served), "Once upon", 8, scheme=scheme)
    assert own != greedy_sample(open_toy(served), "Once upon", 8, scheme=NOTHING)


def test_what_comes_later_changes_nothing_before(toy: Path) -> None:
    """So tokens may be generated one by one, with K and V kept."""
    reader = InFloat64(
        open_toy(toy), torch.device("cpu"), ActivationRounding(**W4A4KV4)
    )
    block = reader.block(0, reader.rope(31))
    x_BTD = reader.embedding()[WINDOWS].double()
    whole_BTD = block.forward(x_BTD)
    for tokens in (1, 2, 17, 30):
        part_BTD = block.forward(x_BTD[:, :tokens])
        torch.testing.assert_close(
            part_BTD, whole_BTD[:, :tokens], rtol=1e-6, atol=1e-6
        )


def hessians(
    monkeypatch: pytest.MonkeyPatch, toy: Path, output: Path, **settings: Any
) -> list[Tensor]:
    """Return the Hessian of each stage of a run, whole, as it was factorised."""
    found = []

    def recording(hessian: Any, *more: Any) -> Any:
        upper_II = hessian.matrix_II.double().triu()
        found.append(upper_II + upper_II.triu(1).mT)
        return factorise(hessian, *more)

    monkeypatch.setattr(block_solver, "factorise", recording)
    run_toy(toy, output, **settings)
    return found


STAGE_ENDS = [
    f"model.layers.{block}.{name}"
    for block in range(2)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize(
    "scheme",
    [
        SMOOTH,
        SMOOTH | {"activation_symmetric": False, "activation_group_size": 48},
        SMOOTH | {"kv_symmetric": False},
    ],
)
def test_hessians_are_those_of_what_the_served_model_sees(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: dict[str, Any],
) -> None:
    """Nothing after a linear changes its input: the finished model tells them all."""
    settings: dict[str, Any] = {"method": "gptq", "bits": 4} | scheme
    found = hessians(monkeypatch, toy, tmp_path / "out", **settings)
    model = transformers_model(toy, decoded_state(tmp_path / "out"))
    _, windows = plan_toy(toy, **settings)
    assert windows is not None
    seen = []
    for way in (scheme, {}):
        with serving(model, Served(**way)) as served, torch.no_grad():
            model(windows.window_BT.long(), use_cache=False)
        seen.append({n: x.double().flatten(0, 1) for n, x in served.seen.items()})
    assert len(found) == 8
    for hessian_II, linear in zip(found, STAGE_ENDS, strict=True):
        x_NI, plain_NI = (inputs[linear] for inputs in seen)
        assert close(hessian_II, x_NI.T @ x_NI), linear
        assert not close(hessian_II, plain_NI.T @ plain_NI), linear


def test_importance_is_the_attention_of_the_served_model(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"rotation": "none", "importance_min": 0.01} | SMOOTH
    found = hessians(monkeypatch, toy, tmp_path / "out", **settings)[0]
    model = transformers_model(toy)
    _, windows = plan_toy(toy, **settings)
    assert windows is not None
    for way in (SMOOTH, SMOOTH | {"kv_bits": 16, "kv_clip": 1.0}):
        with serving(model, Served(**way)) as served, torch.no_grad():
            model(windows.window_BT.long(), use_cache=False)
        weight_BT = token_weights(served.received[0], 0.01, 1.0)
        x_BTI = served.seen[STAGE_ENDS[0]].double()
        expected = torch.einsum("bt,bti,btj->ij", weight_BT, x_BTI, x_BTI)
        assert close(found, expected) == (way == SMOOTH)


def test_the_full_precision_stream_stays_as_computed(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    cross_term_error = error_propagation.cross_term_error

    def recording(quantized: Any, full: Any, *more: Any) -> Tensor:
        seen.append(full.value_BTI)
        return cross_term_error(quantized, full, *more)

    place = "rsq_stream.pipeline.stage_statistics.cross_term_error"
    monkeypatch.setattr(place, recording)
    settings: dict[str, Any] = {"method": "gptq", "propagate": 0.5} | W4A4KV4
    run_toy(toy, tmp_path / "out", plan={"unit_sequences": 5}, **settings)
    _, windows = plan_toy(toy, **settings)
    assert windows is not None
    model = transformers_model(toy)
    with serving(model, Served()) as served, torch.no_grad():
        model(windows.window_BT.long(), use_cache=False)
    for found_BTI, linear in zip(seen, STAGE_ENDS, strict=True):
        torch.testing.assert_close(found_BTI, served.seen[linear], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [2, 4, 9])
def test_stopped_and_resumed_it_has_the_same_bytes(
    toy: Path, served: Path, tmp_path: Path, stage: int
) -> None:
    stop, count = threading.Event(), 0

    def listener(event: Event) -> None:
        nonlocal count
        count += isinstance(event, StageStarted)
        if count == stage:
            stop.set()

    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run_toy(toy, output, listener=listener, stop=stop, **SERVED_RUN)
    if stage == 9:
        message = r"activation_bits was 4 and is now 8"
        with pytest.raises(PlanMismatchError, match=message):
            run_toy(toy, output, **SERVED_RUN | {"activation_bits": 8})
    otherwise: dict[str, Any] = {
        "execution": {"in_flight": 1, "resident_units": 0},
        "options": {"workers": 2},
    }
    run_toy(toy, output, **SERVED_RUN, **otherwise)
    assert contents(output) == contents(served)


def test_calibrating_as_served_changes_the_codes_and_helps(
    toy: Path, served: Path
) -> None:
    plain = toy.with_name("plain")
    run_toy(toy, plain, **SERVED_RUN | {"activation_bits": 16, "kv_bits": 16})
    one, other = decoded_state(served), decoded_state(plain)
    names = [f"{name}.weight" for name in linear_names(2)]
    assert not any(torch.equal(one[name], other[name]) for name in names)
    windows = plan_toy(toy, **SERVED_RUN)[1]
    assert windows is not None
    scheme, found = ActivationRounding(**W4A4KV4), []
    for folder in (served, plain):
        made = evaluate(
            open_toy(folder),
            windows.window_BT.long(),
            against=open_toy(toy),
            scheme=scheme,
        )
        assert made.kl_divergence is not None
        found.append(made.kl_divergence)
    assert found[0] < 0.9 * found[1]


def test_what_bits_cost_is_measured_in_full_precision(toy: Path) -> None:
    plan, _ = plan_toy(toy, **CLIPPED)
    plain, _ = plan_toy(toy)
    assert plan != plain
    assert sensitivity_plan(plan) == sensitivity_plan(plain)


def test_groups_that_are_not_whole_are_refused_at_once(toy: Path) -> None:
    scheme: dict[str, Any] = {"activation_bits": 4, "activation_group_size": 64}
    message = r"divisor of the 96 inputs of self_attn.q_proj, not 64$"
    with pytest.raises(UsageError, match=message):
        plan_toy(toy, **scheme)
    with pytest.raises(UsageError, match=message):
        evaluate(open_toy(toy), WINDOWS, scheme=ActivationRounding(**scheme))


WORDS = "4-bit inputs of linears, symmetric; 4-bit K and V, symmetric"


def test_plan_and_inspect_say_what_is_rounded(
    run: Run, toy: Path, served: Path, tmp_path: Path
) -> None:
    wanted = ("plan", toy, "--output", tmp_path / "out")
    given = ("--activation-bits", "4", "--kv-bits", "4", "--kv-clip", "0.95")
    code, out, _ = run(*wanted, *given)
    assert (code, f"activations       {WORDS}, clip 0.95\n" in out) == (0, True)
    assert "activations" not in run(*wanted)[1]
    assert f"activations      {WORDS}\n" in run("inspect", served)[1]
    assert (
        f"activations ({WORDS}), which no loader" in (served / "README.md").read_text()
    )


def test_status_says_what_is_rounded(run: Run, toy: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run_toy(toy, output, stop=stop, **SERVED_RUN)
    out = run("status", output.with_name("out.work"))[1]
    assert "calibration file, activation_bits 4, kv_bits 4\n" in out


def test_eval_says_what_it_simulates(
    run: Run, toy: Path, served: Path, tmp_path: Path
) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "served"
    text.write_text("It was the best of times, it was the worst of times.")
    shutil.copytree(served, folder)
    toy_tokenizer(folder)
    measure = ("--text", text, "--sequence-length", "16", "--device", "cpu")
    code, out, _ = run("eval", folder, *measure, "--against", folder)
    assert (code, f"simulated        {WORDS} (as the model was" in out) == (0, True)
    assert f"simulated of it  {WORDS}\n" in out
    off = ("--activation-bits", "16", "--kv-bits", "16")
    out = run("eval", folder, *measure, *off)[1]
    assert f"nothing (the model was calibrated for: {WORDS})" in out
    given = ("--activation-asymmetric", "--kv-clip", "0.95", "--json")
    found = json.loads(run("eval", folder, *measure, *given)[1])
    assert found["simulated"] == {
        "activation_bits": 4,
        "activation_group_size": -1,
        "activation_symmetric": False,
        "activation_clip": 1.0,
        "kv_bits": 4,
        "kv_symmetric": True,
        "kv_clip": 0.95,
    }
    assert not found["as_calibrated"]
    code, out, _ = run("eval", toy, *measure, "--kv-bits", "4")
    assert (code, "simulated   4-bit K and V, symmetric\n" in out) == (0, True)
    assert "simulated" not in run("eval", toy, *measure)[1]
    code, _, err = run("eval", toy, *measure, "--kv-clip", "0.9")
    assert (code, err) == (1, "error: --kv-clip needs --kv-bits\n")
