"""The textbook is right by itself, before anything is compared with it."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rsq_stream.model.families import FAMILIES
from tests.support.entries import family_config
from tests.support.textbook import (
    attention_sums,
    in_float64,
    perplexity,
    quantize_model,
    received_attention,
    rotate,
    stages,
    token_weights,
)
from tests.support.textbook_solver import clip_search, gptq, rtn


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny: beside other work, waiting for threads takes most time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonal(size: int) -> Tensor:
    q: Tensor = torch.linalg.qr(random(size, size, seed=size)).Q
    return q


def correlated(inputs: int) -> Tensor:
    """A Hessian whose eigenvalues span three decades."""
    q_II = orthogonal(inputs)
    return q_II * torch.logspace(0, -3, inputs) @ q_II.T


def tiny(family: str, *, tied: bool = False, kv_heads: int = 2) -> Any:
    """Two blocks with nothing at 0 or 1: not the biases, and not the gains."""
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        intermediate_size=172,
        num_hidden_layers=2,
        tie_word_embeddings=tied,
        **family_config(family),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            gain = name.endswith("norm.weight")
            nn.init.normal_(parameter, mean=float(gain), std=0.2 if gain else 0.1)
    in_float64(model)
    return model


def windows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(64, (3, 40), generator=generator)


def rotations(model: Any) -> dict[str, Any]:
    head_dim = model.model.layers[0].self_attn.head_dim
    return {"q_DD": orthogonal(96), "r_KK": orthogonal(head_dim)}


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(windows(), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_is_the_published_model(family):
    model = tiny(family, kv_heads=3)
    ours_BTV = logits(model)
    published = AutoModelForCausalLM.from_config(model.config)
    published.load_state_dict(model.state_dict())
    published.double().set_attn_implementation("eager")
    torch.testing.assert_close(ours_BTV, logits(published), rtol=0, atol=1e-5)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_leaves_the_logits(family, full):
    model = tiny(family, tied=full)
    before_BTV = logits(model)
    linear = model.model.layers[1].self_attn.q_proj
    weight_OI = linear.weight.clone()
    online = {"heads_HH": orthogonal(6), "mlp_II": orthogonal(172)} if full else {}
    rotate(model, **rotations(model), **online)
    torch.testing.assert_close(logits(model), before_BTV, rtol=0, atol=1e-9)
    assert (linear.weight - weight_OI).norm() > weight_OI.norm()
    assert model.model.norm.weight.unique().tolist() == [1]


def test_clip_search_takes_the_best_of_all_candidates():
    target_RC = random(5, 32)
    scale_R, zero_R = clip_search(target_RC, 3)
    assert zero_R.tolist() == [4] * 5
    for target_C, found in zip(target_RC, scale_R, strict=True):
        errors = {}
        for step in range(80):
            for sign in (1, -1):
                scale = (target_C.abs().max() / 3 * (1 - 0.01 * step)).float() * sign
                levels_L = scale.double() * torch.arange(-4, 4)
                near_C = (target_C[:, None] - levels_L).abs().amin(1)
                errors[float(scale)] = float(near_C.square().sum())
        assert errors[float(found)] == pytest.approx(min(errors.values()), rel=1e-12)
    assert len(scale_R.sign().unique()) == 2


def test_clip_search_on_given_rows():
    rows_RC = torch.tensor([[0.0, 0.0], [3.0, -3.0], [-4.0, 3.0], [4.0, -3.0]])
    assert clip_search(rows_RC, 3, steps=1)[0].tolist()[:2] == [1, 1]
    exact_R = clip_search(rows_RC[2:] * 3, 3, steps=26)[0]
    torch.testing.assert_close(exact_R.float(), torch.tensor([3.0, -3.0]))
    scale_R, zero_R = clip_search(rows_RC, 3, symmetric=False, steps=1)
    torch.testing.assert_close(scale_R.float(), torch.tensor([1, 6 / 7, 1, 1]))
    assert zero_R.tolist() == [0, 4, 4, 3]


@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_decoded_values_are_codes_on_their_grid(group_size, symmetric):
    options: dict[str, Any] = {"symmetric": symmetric, "storage": torch.float64}
    weight_OI = random(8, 48)
    for found in (
        rtn(weight_OI, 3, group_size, **options),
        gptq(weight_OI, correlated(48), 3, group_size, **options),
    ):
        groups = 3 if group_size == 16 else 1  # 32 does not divide 48
        assert found.scale_OG.shape == found.zero_OG.shape == (8, groups)
        scale_OI = found.scale_OG.repeat_interleave(48 // groups, 1)
        zero_OI = found.zero_OG.repeat_interleave(48 // groups, 1)
        assert set(found.codes_OI.unique().tolist()) <= set(range(8))
        assert torch.equal(found.decoded_OI, scale_OI * (found.codes_OI - zero_OI))


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, -1), (4, 16)])
def test_gptq_beats_rtn_in_the_norm_of_the_hessian(bits, group_size):
    weight_OI, hessian_II = random(32, 64), correlated(64)

    def loss(decoded_OI: Tensor) -> float:
        error_OI = weight_OI - decoded_OI
        return float(((error_OI @ hessian_II) * error_OI).sum())

    rounded = loss(rtn(weight_OI, bits, group_size).decoded_OI)
    for dynamic in (True, False):
        found = gptq(weight_OI, hessian_II, bits, group_size, dynamic=dynamic)
        assert loss(found.decoded_OI) < 0.85 * rounded


@pytest.mark.parametrize("group_size", [-1, 16])
def test_gptq_without_correlation_is_rtn(group_size):
    weight_OI, identity_II = random(8, 64), torch.eye(64)
    found = gptq(weight_OI, identity_II, 3, group_size, dynamic=False)
    expected = rtn(weight_OI, 3, group_size)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dynamic", [True, False])
def test_each_column_makes_up_for_the_ones_before(dynamic):
    """The optimum over the rest, given the rounded columns, in closed form."""
    weight_OI, hessian_II = random(8, 24), correlated(24)
    found = gptq(weight_OI, hessian_II, 3, 8, dynamic=dynamic)
    hessian_II = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(24)
    for i in range(24):
        past_OP = weight_OI[:, :i] - found.decoded_OI[:, :i]
        pull_PF = torch.linalg.solve(hessian_II[i:, i:], hessian_II[i:, :i]).T
        rest_OF = weight_OI[:, i:] + past_OP @ pull_PF
        scale_O, zero_O = found.scale_OG[:, i // 8], found.zero_OG[:, i // 8]
        if i % 8 == 0:
            grid_OC = rest_OF[:, :8] if dynamic else weight_OI[:, i : i + 8]
            assert torch.equal(clip_search(grid_OC, 3)[0], scale_O)
        codes_O = (rest_OF[:, 0] / scale_O).round() + zero_O
        assert torch.equal(codes_O.clamp(0, 7), found.codes_OI[:, i])


def test_column_sums_are_a_plain_causal_softmax():
    heads, groups, tokens = 6, 2, 9
    q_HTK, k_GTK = random(heads, tokens, 4), random(groups, tokens, 4, seed=1)
    sums_T = torch.zeros(tokens, dtype=torch.float64)
    for head in range(heads):
        for t in range(tokens):
            scores = k_GTK[head // 3, : t + 1] @ q_HTK[head, t] * 0.5
            sums_T[: t + 1] += scores.softmax(0)
    found_T = attention_sums(q_HTK, k_GTK, 0.5)
    torch.testing.assert_close(found_T, sums_T)
    assert float(found_T.sum()) == pytest.approx(heads * tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_received_attention_is_that_of_the_model(family):
    model = tiny(family)
    model.set_attn_implementation("eager")  # its softmax is float32
    with torch.no_grad():
        outputs = model(windows(), output_attentions=True, output_hidden_states=True)
        found_BT = importance(model, 1, outputs.hidden_states[1])
    expected_BT = outputs.attentions[1].sum((1, 2))
    torch.testing.assert_close(found_BT, expected_BT, rtol=0, atol=1e-5)


def importance(model: Any, block: int, hidden_BTD: Tensor) -> Tensor:
    positions_1T = torch.arange(hidden_BTD.shape[1])[None]
    call = {"position_embeddings": model.model.rotary_emb(hidden_BTD, positions_1T)}
    return received_attention(model.model.layers[block], hidden_BTD, call)


def test_token_weights():
    found_BT = token_weights(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]), 0.5, 1)
    expected_T = torch.tensor([2, 4, 3], dtype=torch.float64) / 3
    assert torch.equal(found_BT[0], expected_T.bfloat16().double())
    assert found_BT[1].tolist() == [1, 1, 1]
    exact_BT = token_weights(torch.tensor([[1.0, 3.0, 2.0]]), 0.5, 1, exact=True)
    assert torch.equal(exact_BT[0], expected_T)


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "gptq"), ("qwen2", "quarot"), *((family, "rsq") for family in FAMILIES)],
)
def test_each_linear_was_quantized_on_what_it_now_sees(family, method):
    """Nothing after a linear changes its inputs: the result checks the order."""
    model, before = tiny(family), tiny(family)
    plan: dict[str, Any] = {"bits": 3, "group_size": 48, "steps": 5}
    plan |= {} if method == "gptq" else rotations(model)
    quantize_model(model, windows(), method=method, importance_min=0.1, **plan)
    if method != "gptq":
        rotate(before, **rotations(before))
    seen: dict[nn.Module, Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]}))
    with torch.no_grad():
        outputs = model(windows(), use_cache=False, output_hidden_states=True)
        for i, block in enumerate(model.model.layers):
            weights_BT = torch.ones(windows().shape, dtype=torch.float64)
            if method == "rsq":
                sums_BT = importance(before, i, outputs.hidden_states[i])
                weights_BT = token_weights(sums_BT, 0.1, 1)
                assert weights_BT.std() > 0.1
            given = chain(*stages(before.model.layers[i]))
            for linear, original in zip(chain(*stages(block)), given, strict=True):
                x_NI = (seen[linear] * weights_BT.sqrt()[:, :, None]).flatten(0, 1)
                expected = gptq(original.weight, x_NI.T @ x_NI, 3, 48, steps=5)
                torch.testing.assert_close(linear.weight.data, expected.decoded_OI)


def test_rsq_with_equal_weights_is_quarot():
    first, second = tiny("llama", tied=True), tiny("llama", tied=True)
    shared = {"bits": 4, "group_size": 32, "steps": 5, **rotations(first)}
    quantize_model(first, windows(), method="quarot", **shared)
    quantize_model(second, windows(), method="rsq", importance_min=1, **shared)
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("method", ["rtn", "gptq", "quarot", "rsq"])
def test_many_bits_leave_the_perplexity(method):
    model = tiny("llama", tied=True)
    before = perplexity(model, windows())
    plan: dict[str, Any] = {"bits": 12, "group_size": 32, "steps": 1}
    plan |= {} if method in ("rtn", "gptq") else rotations(model)
    quantize_model(model, windows(), method=method, **plan)
    assert 0 < abs(perplexity(model, windows()) / before - 1) < 2e-3


def test_unquantized_tensors_of_a_rotated_model_are_stored():
    model = tiny("qwen2")
    plan: dict[str, Any] = {"bits": 4, "group_size": -1, "storage": torch.bfloat16}
    quantize_model(model, windows(), method="quarot", **plan, **rotations(model))
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.bfloat16().double())


def test_perplexity_is_that_of_the_loss_of_the_model():
    model = tiny("qwen3")
    with torch.no_grad():
        loss = model(windows(), labels=windows()).loss
    assert perplexity(model, windows()) == pytest.approx(float(loss.exp()), rel=1e-6)
