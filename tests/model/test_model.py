"""Blocks are transformers' own layers; rotation leaves what a model says."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import rms_norm

from rsq_stream.algorithm.rotation.rotation import make_rotation, rotation_name
from rsq_stream.errors import UnsupportedModelError
from rsq_stream.model import fused_rotation
from rsq_stream.model.architecture import Architecture, read_architecture
from rsq_stream.model.block import Block
from rsq_stream.model.families import FAMILIES
from rsq_stream.model.fused_rotation import ModelRotation
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD, block_prefix
from rsq_stream.model.transformers_layers import Rope, layer_config
from tests.support.entries import family_config
from tests.support.toy import LINEARS, STAGES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = 50
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Options that only some families know; mistral's heads of 26 do not add to its width.
PECULIAR: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"head_dim": 26, "sliding_window": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
}


class Toy(NamedTuple):
    """A model of transformers, its sizes as read, and its tensors."""

    model: Any
    architecture: Architecture
    tensors: dict[str, Tensor]
    window_BT: Tensor


def toy(family: str, width: int, *, tied: bool = False, device: str = "cpu") -> Toy:
    """Two blocks, grouped KV heads, MLP 172; no gain is 1 and no bias is 0."""
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=63,
        hidden_size=width,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=6 if width % 6 == 0 else 10,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        **family_config(family) | PECULIAR.get(family, {}),
    )
    generator = torch.Generator().manual_seed(width)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        mean, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.1)
        parameter.requires_grad_(requires_grad=False).copy_(mean + spread * noise)
    tensors = dict(model.to(device).state_dict())
    window_BT = torch.randint(63, (2, TOKENS), generator=generator).to(device)
    architecture = read_architecture(config.to_dict(), "config.json")
    return Toy(model, architecture, tensors, window_BT)


def block_tensors(toy: Toy, index: int) -> dict[str, Tensor]:
    prefix = block_prefix(index)
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in toy.tensors.items()
        if name.startswith(prefix)
    }


def rotated(
    toy: Toy, tensors: dict[str, Tensor], rotation: ModelRotation
) -> dict[str, Tensor]:
    return rotation.block(tensors, toy.architecture.linears(0).values())


def blocks(toy: Toy, rotation: ModelRotation | None = None) -> Iterator[Block]:
    family, device = toy.architecture.family, toy.window_BT.device
    config = layer_config(family, toy.model.config.to_dict())
    rope = Rope(family, config, tokens=TOKENS, dtype=torch.float32, device=device)
    for index in range(2):
        tensors = block_tensors(toy, index)
        tensors = rotated(toy, tensors, rotation) if rotation else tensors
        yield Block(family, config, index, tensors, rope=rope)


def logits(toy: Toy, rotation: ModelRotation | None = None) -> Tensor:
    """The model's logits by a chain of blocks."""
    embedding, gain_D = toy.tensors[EMBEDDING], toy.tensors[FINAL_NORM]
    head = embedding if toy.architecture.tied else toy.tensors[LM_HEAD]
    if rotation:
        embedding, head = rotation.embedding(embedding), rotation.head(head, gain_D)
        gain_D = torch.ones_like(gain_D)
    x_BTD = embedding[toy.window_BT]
    for block in blocks(toy, rotation):
        x_BTD = block.forward(x_BTD)
    eps = toy.model.config.rms_norm_eps
    return rms_norm(x_BTD, gain_D.shape, gain_D, eps) @ head.T


def rotation_of(toy: Toy) -> ModelRotation:
    sizes = toy.architecture.width, toy.architecture.head_width
    r1, r2 = (make_rotation(rotation_name(n), n, seed) for seed, n in enumerate(sizes))
    return ModelRotation(r1, r2)


each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("width", "tied"), [(96, False), (96, True), (160, False), (192, True)]
)
@each_family
def test_rotation_leaves_the_logits(family, width, tied, device):
    source = toy(family, width, tied=tied, device=device)
    expected_BTV = source.model(source.window_BT).logits
    assert float(expected_BTV.std()) > 0.5
    found_BTV = logits(source, rotation_of(source))
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=1e-4)


@each_family
def test_rotation_turns_all_that_touches_the_stream_and_the_values(family):
    source = toy(family, 96)
    before = block_tensors(source, 0)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    after = rotated(source, dict(before), rotation_of(source))
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert torch.equal(tensor, kept[name]), f"{name} was changed in place"
        assert after[name].shape == tensor.shape
        assert after[name].is_contiguous()
        if name.endswith("layernorm.weight"):
            assert bool((after[name] == 1).all())
        elif name.endswith("proj.weight"):
            assert float((after[name] - tensor).norm() / tensor.norm()) > 0.5
    for name in ("q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight"):
        if f"self_attn.{name}" in before:
            assert after[f"self_attn.{name}"] is before[f"self_attn.{name}"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [96, 160])
@each_family
def test_a_chain_of_blocks_is_the_model(family, width, device):
    source = toy(family, width, device=device)
    expected_BTV = source.model(source.window_BT).logits
    found_BTV = logits(source)
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@each_family
def test_column_sums_are_those_of_the_eager_map(family, device):
    source = toy(family, 96, device=device)
    source.model.set_attn_implementation("eager")
    seen = source.model(
        source.window_BT, output_attentions=True, output_hidden_states=True
    )
    for index, block in enumerate(blocks(source)):
        a_BTD = block.attention_input(seen.hidden_states[index])
        found_BT = block.column_sums(a_BTD)
        expected_BT = seen.attentions[index].double().sum((1, 2)).float()
        torch.testing.assert_close(found_BT, expected_BT, rtol=1e-5, atol=1e-5)


@each_family
def test_stages_chain_to_the_block_and_take_another_weight(family):
    source = toy(family, 96)
    x_BTD = source.tensors[EMBEDDING][source.window_BT]
    for stage in STAGES:
        block = next(blocks(source))
        linears = [linear.name for linear in stage.linears]
        for linear in linears:
            half_OI = block.weight(linear) / 2
            block.replace_weight(linear, half_OI.double())
            assert torch.equal(block.weight(linear), half_OI)
            assert block.weight(linear).dtype == torch.float32
        a_BTD = block.attention_input(x_BTD)
        h_BTD = block.after_attention(x_BTD, block.attention_output(a_BTD))
        u_BTI = block.mlp_output(block.mlp_input(h_BTD))
        found_BTD = block.after_mlp(h_BTD, u_BTI)
        assert torch.equal(found_BTD, block.forward(x_BTD))
        # The same weights in the layer of transformers itself.
        for linear in linears:
            layer = source.model.model.layers[0]
            layer.get_submodule(linear).weight.copy_(block.weight(linear))
        seen = source.model(source.window_BT, output_hidden_states=True)
        expected_BTD = seen.hidden_states[1]
        torch.testing.assert_close(found_BTD, expected_BTD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@each_family
def test_shapes_are_those_of_the_checkpoint(family, tied):
    source = toy(family, 160, tied=tied)
    shapes = {name: tuple(value.shape) for name, value in source.tensors.items()}
    if tied:  # the state names both, a checkpoint holds one
        assert shapes.pop(LM_HEAD) == shapes[EMBEDDING]
    announced = source.architecture.outer_shapes()
    for index in range(source.architecture.blocks):
        for name, shape in source.architecture.block_shapes(index).items():
            announced[block_prefix(index) + name] = shape
    assert announced == shapes
    shapes = source.architecture.block_shapes(0)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    assert {f"{linear}.weight" for linear in LINEARS} == set(matrices)


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 63,
}
KNOWN = f"supported are {', '.join(FAMILIES)}"
BOUND = "must be a whole number from 1 to"
REFUSED = [
    (
        {"model_type": "gpt2"},
        f"model_type 'gpt2' is not supported; {KNOWN}",
    ),
    ({"model_type": None}, f"model_type None is not supported; {KNOWN}"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu', not 'gelu'"),
    ({"hidden_size": None}, f"hidden_size {BOUND} 131072, not None"),
    ({"hidden_size": True}, f"hidden_size {BOUND} 131072, not True"),
    ({"hidden_size": 131073}, f"hidden_size {BOUND} 131072, not 131073"),
    ({"intermediate_size": 0}, f"intermediate_size {BOUND} 1048576, not 0"),
    ({"intermediate_size": "172"}, f"intermediate_size {BOUND} 1048576, not '172'"),
    ({"num_hidden_layers": -1}, f"num_hidden_layers {BOUND} 2048, not -1"),
    ({"num_attention_heads": 6.0}, f"num_attention_heads {BOUND} 2048, not 6.0"),
    ({"num_key_value_heads": 0}, f"num_key_value_heads {BOUND} 2048, not 0"),
    ({"head_dim": 5000}, f"head_dim {BOUND} 4096, not 5000"),
    ({"vocab_size": 2**22 + 1}, f"vocab_size {BOUND} 4194304, not 4194305"),
    (
        {"max_position_embeddings": []},
        f"max_position_embeddings {BOUND} 33554432, not []",
    ),
    (
        {"num_key_value_heads": 4},
        "num_attention_heads (6) must be a multiple of num_key_value_heads (4)",
    ),
    (
        {"hidden_size": 160},
        "hidden_size (160) must be a multiple of num_attention_heads (6)",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED]
)
def test_refusals(change, message):
    assert read_architecture(LLAMA, "there").head_width == 16
    with pytest.raises(UnsupportedModelError) as caught:
        read_architecture(LLAMA | change, "there")
    assert str(caught.value) == f"there: {message}"


@pytest.mark.parametrize("length", [1, 7, 63])
def test_a_rotation_in_parts_is_the_same(monkeypatch, length):
    """As on a GPU, where a whole linear beside its rotation would be too much."""
    source = toy("llama", 96)
    rotation, before = rotation_of(source), block_tensors(source, 0)
    whole = rotated(source, dict(before), rotation)
    monkeypatch.setattr(fused_rotation, "_part_length", lambda *_: length)
    own = {name: tensor.clone() for name, tensor in before.items()}
    parts = rotated(source, own, rotation)
    assert own == {}
    assert parts.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6)
