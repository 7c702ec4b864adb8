"""A full rotation: nothing a model says changes, and nobody loads it wrongly."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import rsq_stream
from rsq_stream.algorithm.rotation.rotation import make_rotation, rotation_name
from rsq_stream.checkpoint.loading import load_model
from rsq_stream.checkpoint.source import Source
from rsq_stream.errors import (
    CheckpointError,
    Interrupted,
    UnsupportedModelError,
    UsageError,
)
from rsq_stream.evaluation.perplexity import evaluate
from rsq_stream.events import Event, StageStarted
from rsq_stream.model.block import Block
from rsq_stream.model.families import FAMILIES
from rsq_stream.model.online_rotation import (
    KEY,
    OnlineRotations,
    planned_rotations,
    read_rotations,
)
from rsq_stream.model.transformers_layers import Rope, layer_config
from rsq_stream.output.verify import verify
from rsq_stream.pipeline.bit_allocation.measure import measure, sensitivity_plan
from rsq_stream.planning.validate import inspect_checkpoint
from tests.support import textbook
from tests.support.dense import matrix_of, textbook_rotations
from tests.support.entries import each_with, family_config
from tests.support.toy import (
    LINEARS,
    calm,
    contents,
    decoded_state,
    execution_for,
    job_of,
    open_toy,
    options_for,
    plan_toy,
    read_json,
    run_toy,
    toy_checkpoint,
    toy_windows,
)

FULL: dict[str, Any] = {"rotation": "full"}
WINDOWS = toy_windows(128, 3, 24, 5).window_BT.long()


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with calm():
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("full") / "toy", tied=True)


@pytest.fixture(scope="module")
def made(toy: Path) -> Path:
    """The toy to 3 bits, fully rotated, by exact token weights."""
    run_toy(toy, toy.with_name("made"), importance_exact=True, **FULL)
    return toy.with_name("made")


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


@torch.no_grad()
def logits(model: Any, window_BT: Tensor = WINDOWS) -> Tensor:
    found: Tensor = model.eval()(window_BT).logits
    return found


# Head counts and head widths for which other constructions of the rotation of o's
# input break: their Hadamard matrix of all inputs is no product of the two parts.
HEADS = [(24, 128), (12, 128), (14, 64), (40, 128), (7, 16), (1, 64), (6, 26)]


@pytest.mark.parametrize(("heads", "width"), HEADS)
def test_o_undoes_the_rotation_of_its_input(heads: int, width: int) -> None:
    """The values rotated in each head by the weights of v, across heads online."""
    across = make_rotation(rotation_name(heads), heads, 3)
    inside = make_rotation(rotation_name(width), width, 4)
    c_TI, weight_OI = random(5, heads * width), random(7, heads * width, seed=1)
    weight_OI /= (heads * width) ** 0.5
    online = OnlineRotations(across)
    seen_TI = online.of_attention(inside.apply_per_head(c_TI))
    folded_OI = online.of_attention(inside.apply_per_head(weight_OI))
    expected_TO = c_TI.double() @ weight_OI.double().T
    torch.testing.assert_close(
        (seen_TI @ folded_OI.T).double(), expected_TO, rtol=0, atol=1e-4
    )
    whole_II = torch.kron(matrix_of(across), matrix_of(inside))
    torch.testing.assert_close(
        seen_TI.double(), c_TI.double() @ whole_II, rtol=0, atol=1e-5
    )
    if heads > 1:
        assert (seen_TI - inside.apply_per_head(c_TI)).norm() > 0.5 * c_TI.norm()


MLP = {
    172: "orthogonal-172",
    4864: "hadamard-4864",
    9728: "hadamard-9728",
    11008: "block-hadamard-256",
    17408: "hadamard-17408",
    18944: "hadamard-18944",
    25600: "hadamard-25600",
    28672: "hadamard-28672",
}


@pytest.mark.parametrize("width", MLP)
def test_down_undoes_the_rotation_of_its_input(width: int) -> None:
    assert rotation_name(width) == MLP[width]
    online = OnlineRotations(mlp=make_rotation(MLP[width], width, 5))
    u_BTI = random(1, 6, width)
    u_BTI[..., 0] = 50 * width**0.5  # an outlier, that the rotation is there to spread
    weight_OI = random(5, width, seed=1) / width**0.5
    weight_OI[:, 0] /= 50
    seen_BTI, folded_OI = online.of_mlp(u_BTI), online.of_mlp(weight_OI)
    assert seen_BTI.dtype == torch.float32
    expected_BTO = u_BTI.double() @ weight_OI.double().T
    torch.testing.assert_close(
        seen_BTI.double() @ folded_OI.double().T, expected_BTO, rtol=0, atol=1e-4
    )
    assert seen_BTI.abs().max() < 0.5 * u_BTI.abs().max()


SIZES: list[dict[str, Any]] = [
    {"heads": 24, "kv_heads": 8, "width": 96, "head_dim": 8},
    {"heads": 14, "kv_heads": 2, "width": 64, "head_dim": 26},
    {"heads": 12, "kv_heads": 4, "width": 64, "head_dim": 128},
    {"heads": 6, "kv_heads": 2, "width": 96, "head_dim": 24},
]


@pytest.mark.parametrize(("family", "sizes"), each_with(FAMILIES, SIZES))
def test_a_rotated_model_says_what_its_source_does(
    tmp_path: Path, family: str, sizes: dict[str, Any]
) -> None:
    """In 16-bit form too: norms, embedding, head, biases and all."""
    config = family_config(family) | sizes
    if FAMILIES[family].whole_heads:
        config["width"] = 4 * config["heads"]
    source = toy_checkpoint(
        tmp_path / "toy", family=family, straddle=False, mlp=76, **config
    )
    output = tmp_path / "out"
    run_toy(source, output, method="rotate", **FULL)
    before = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert before.std() > 0.5
    assert (logits(load_model(output)) - before).abs().max() < 1e-4
    ours = evaluate(open_toy(output), WINDOWS, against=open_toy(source))
    assert ours.kl_divergence == pytest.approx(0, abs=1e-6)
    assert not verify(output, open_toy(source)).problems
    # And it is the online part that does it.
    plain = load_model(output)
    for module in plain.modules():
        module._forward_pre_hooks.clear()
    assert (logits(plain) - before).abs().max() > 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_both_streams_of_a_block_agree(tmp_path: Path, family: str) -> None:
    """A block with online rotations is the portable block, stage by stage."""
    source = toy_checkpoint(tmp_path / "toy", family=family, **family_config(family))
    checkpoint = open_toy(source)
    architecture = inspect_checkpoint(checkpoint)
    cpu, x_BTD = torch.device("cpu"), random(2, 24, 96)
    config = layer_config(architecture.family, checkpoint.config)
    rope = Rope(architecture.family, config, tokens=24, dtype=torch.float32, device=cpu)
    found = []
    for kind in ("portable", "full"):
        plan, _ = plan_toy(source, rotation=kind)
        tensors = Source(
            checkpoint, architecture=architecture, plan=plan, device=cpu
        ).block(1)
        online = planned_rotations(plan, architecture)
        block = Block(architecture.family, config, 1, tensors, rope=rope, online=online)
        a_BTD = block.attention_input(x_BTD)
        c_BTI = block.attention_output(a_BTD)
        h_BTD = block.after_attention(x_BTD, c_BTI)
        u_BTI = block.mlp_output(block.mlp_input(h_BTD))
        x_next_BTD = block.after_mlp(h_BTD, u_BTI)
        assert torch.equal(x_next_BTD, block.forward(x_BTD))
        sums_BT = block.column_sums(a_BTD)
        found.append([c_BTI, u_BTI, h_BTD, x_next_BTD, sums_BT])
    portable, full = found
    for left, right in zip(portable[2:], full[2:], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)
    for left, right in zip(portable[:2], full[:2], strict=True):
        assert (left - right).norm() > 0.5 * left.norm()
        torch.testing.assert_close(left.norm(), right.norm())


def test_sixteen_bit_activations_are_rotated_in_fp32() -> None:
    online = OnlineRotations(
        make_rotation("hadamard-12", 12, 3), make_rotation("orthogonal-172", 172, 4)
    )
    for rotate, width in ((online.of_attention, 192), (online.of_mlp, 172)):
        x_LN = random(5, width).bfloat16()
        assert torch.equal(rotate(x_LN), rotate(x_LN.float()).bfloat16())


def whole_model(source: Path, plan: Any) -> Any:
    """The source in float64, rotated as the textbook does it."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    architecture = inspect_checkpoint(open_toy(source))
    textbook.rotate(model, **textbook_rotations(plan, architecture))
    return model


SETTINGS: list[dict[str, Any]] = [
    {"propagate": 0.5, "sweeps": 1, "refit": True},
    {"method": "rtn", "symmetric": False},
    {"method": "gptq", "overrides": ("o_proj=4", "down_proj@1=16")},
    {"group_size": -1, "head_bits": 8},
    {"grid": "nf", "method": "rtn"},
]


@pytest.mark.parametrize(("family", "settings"), each_with(FAMILIES, SETTINGS))
def test_a_quantized_model_is_the_textbooks_with_its_weights(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """Eval, ``load_model`` and a whole float64 model that rotates o's and down's input.

    The textbook's own matrices, not those of config.json.
    """
    source = toy_checkpoint(tmp_path / "toy", family=family, **family_config(family))
    output = tmp_path / "out"
    run_toy(source, output, **FULL, **settings)
    plan, _ = plan_toy(source, **FULL, **settings)
    model = whole_model(source, plan)
    state = {name: t.double() for name, t in decoded_state(output).items()}
    model.load_state_dict(state)
    expected = logits(model)
    assert (logits(load_model(output)) - expected).abs().max() < 1e-4 * expected.std()
    ours = evaluate(open_toy(output), WINDOWS)
    assert ours.perplexity == pytest.approx(textbook.perplexity(model, WINDOWS))
    assert not verify(output, open_toy(source)).problems


def test_many_bits_give_the_source_back(toy: Path, tmp_path: Path) -> None:
    run_toy(toy, tmp_path / "out", bits=8, **FULL)
    before, after = logits(load_model(toy)), logits(load_model(tmp_path / "out"))
    signal, noise = before.square().mean(), (after - before).square().mean()
    assert 10 * torch.log10(signal / noise) > 30


@pytest.mark.parametrize("method", ["rsq", "rotate"])
def test_transformers_refuses_it(toy: Path, tmp_path: Path, method: str) -> None:
    output = tmp_path / "out"
    run_toy(toy, output, method=method, **FULL)
    quantization = read_json(output / "config.json")["quantization_config"]
    assert quantization["quant_method"] is None
    assert quantization[KEY].keys() == {"self_attn.o_proj", "mlp.down_proj"}
    with pytest.raises(ValueError, match="has no `quant_method` attribute"):
        AutoModelForCausalLM.from_pretrained(output)
    with pytest.raises(UnsupportedModelError, match="is quantized already"):
        inspect_checkpoint(open_toy(output))
    card = (output / "README.md").read_text()
    assert "done at inference" in card
    assert "rsq_stream.load_model" in card
    assert "AutoModel" not in card
    assert "compressed-tensors" not in card


def test_a_portable_folder_is_as_it_was(toy: Path, tmp_path: Path) -> None:
    run_toy(toy, tmp_path / "out", rotation="portable")
    quantization = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert KEY not in quantization
    assert "nothing is left to do" in (tmp_path / "out" / "README.md").read_text()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)


def test_a_saved_model_comes_back_with_its_rotations(
    made: Path, tmp_path: Path
) -> None:
    model = load_model(made)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="has no `quant_method` attribute"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


def test_a_loaded_model_generates(made: Path) -> None:
    """With a cache and padding, which the streamed forward has not."""
    model: Any = load_model(made, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(tensor.is_meta for tensor in model.buffers())
    model = load_model(made)
    token_BT, steps = WINDOWS[:1, :8], []
    for _ in range(4):
        steps.append(int(logits(model, token_BT)[0, -1].argmax()))
        token_BT = torch.cat([token_BT, torch.tensor([steps[-1:]])], dim=1)
    found = model.generate(
        WINDOWS[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert found[0, 8:].tolist() == steps


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="no/such: no such folder"):
        load_model("no/such")


REFUSED: list[tuple[str, Any, str]] = [
    ("rotation", "hadamard-4", "must be orthogonal-172 of size 172, all inputs, not"),
    ("size", 171, "must be orthogonal-172 of size 172"),
    ("applied", "across heads", "must be orthogonal-172 of size 172"),
    ("seed", 7, r"of seed 7 has the fingerprint -?\d"),
    ("seed", "7", "is not as this tool writes it"),
    ("fingerprint", float("nan"), "has the fingerprint"),
    ("fingerprint", None, "is not as this tool writes it"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_what_cannot_be_built_alike_is_refused(
    made: Path, field: str, value: Any, message: str
) -> None:
    config = read_json(made / "config.json")
    architecture = inspect_checkpoint(open_toy(made.with_name("toy")))
    assert read_rotations(config, architecture, "here").mlp is not None
    config["quantization_config"][KEY]["mlp.down_proj"][field] = value
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_rotations(config, architecture, "here")
    assert str(caught.value).startswith(f"here: {KEY} of mlp.down_proj")
    config["quantization_config"][KEY]["mlp.up_proj"] = {}
    with pytest.raises(UnsupportedModelError, match=r"must be of self_attn\.o_proj or"):
        read_rotations(config, architecture, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_rotation": "none"}, "portable or none where the residual stream"),
        ({"value_rotation": "none"}, "portable or none where the residual stream"),
    ],
)
def test_a_plan_that_would_load_wrongly_is_refused(
    toy: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=rf"^--rotation must be {message}"):
        plan_toy(toy, plan=changes, **FULL)


def test_a_rotation_of_no_known_kind_is_refused(toy: Path) -> None:
    message = "--rotation must be one of portable, full, none, not fully"
    with pytest.raises(UsageError, match=message):
        plan_toy(toy, rotation="fully")


def test_stopped_and_resumed_it_has_the_same_bytes(
    toy: Path, made: Path, tmp_path: Path
) -> None:
    """In the middle of the second block: its token weights and h are on disk."""
    stop = threading.Event()

    def listener(event: Event) -> None:
        if event == StageStarted(block=1, stage="mlp out", units=3):
            stop.set()

    output, settings = tmp_path / "out", FULL | {"importance_exact": True}
    with pytest.raises(Interrupted):
        run_toy(toy, output, listener=listener, stop=stop, **settings)
    otherwise = {"in_flight": 1, "resident_units": 0}
    options = {"workers": 2}
    run_toy(toy, output, execution=otherwise, options=options, **settings)
    assert contents(output) == contents(made)


def test_what_bits_cost_is_measured_on_rotated_inputs(
    toy: Path, tmp_path: Path
) -> None:
    """q, k, v, gate, up read the same as without; o and down something else."""
    found = []
    for kind in ("portable", "full"):
        chosen: dict[str, Any] = {"rotation": kind, "method": "quarot"}
        plan, windows = plan_toy(toy, **chosen)
        assert windows is not None
        plan, options = sensitivity_plan(plan), options_for(tmp_path / kind)
        execution = execution_for(toy, plan, options)
        parts = {"plan": plan, "execution": execution, "options": options}
        found.append(measure(job_of(open_toy(toy), **parts, windows=windows)))
    for name, portable in found[0].items():
        near = all(
            found[1][name][bits] == pytest.approx(cost, rel=0.01)
            for bits, cost in portable.items()
        )
        assert near != name.endswith(("o_proj", "down_proj")), name


def test_the_rotation_is_in_the_plan_and_in_the_bytes(made: Path, toy: Path) -> None:
    plan = read_json(made / "rsq_stream.json")["plan"]
    assert plan["heads_rotation"] == "orthogonal-6"
    assert plan["mlp_rotation"] == "orthogonal-172"
    portable, full = (
        Source(
            open_toy(toy),
            architecture=inspect_checkpoint(open_toy(toy)),
            plan=plan,
            device=torch.device("cpu"),
        )
        for plan in (plan_toy(toy)[0], plan_toy(toy, **FULL)[0])
    )
    changed = {
        name
        for name, tensor in full.block(0).items()
        if not torch.equal(tensor, portable.block(0)[name])
    }
    assert changed == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert {f"{linear}.weight" for linear in LINEARS} > changed


def test_load_model_is_looked_up_late() -> None:
    assert rsq_stream.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'load_models'"):
        rsq_stream.load_models  # noqa: B018
    program = (
        "import sys, rsq_stream\n"
        "assert 'load_model' in rsq_stream.__all__\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60)
