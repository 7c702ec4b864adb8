"""K and V as a cache would hold them: any length, any heads, one token at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rsq_stream.config.activations import ActivationRounding
from rsq_stream.model.activation_quantizer import (
    AS_COMPUTED,
    ActivationQuantizer,
    rotated_heads,
)
from rsq_stream.model.attention import attention
from tests.support import textbook_activations as textbook

LENGTHS = [1, 31, 172]
WIDTHS = [16, 24, 26, 80, 128]
"""Head widths: 24 is Paley's 12 doubled, 80 his 20 by 4; 26 has blocks of 2 alone."""
W4 = ActivationQuantizer(ActivationRounding(kv_bits=4))


def heads(count: int, tokens: int, width: int, seed: int = 0) -> Tensor:
    """Random, with one channel that is far larger than the others, as K has them."""
    generator = torch.Generator().manual_seed(seed)
    x_BHTK = torch.randn(2, count, tokens, width, generator=generator)
    x_BHTK[..., 3] += 10
    return x_BHTK


def scores(query_BHTK: Tensor, key_BGTK: Tensor) -> Tensor:
    key_BHTK = key_BGTK.repeat_interleave(query_BHTK.shape[1] // key_BGTK.shape[1], 1)
    return query_BHTK.double() @ key_BHTK.double().mT


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_rotated_heads_have_the_same_scores(width, tokens):
    query_BHTK, key_BGTK = heads(6, tokens, width), heads(2, tokens, width, seed=1)
    found = scores(rotated_heads(query_BHTK), rotated_heads(key_BGTK))
    expected = scores(query_BHTK, key_BGTK)
    norms = query_BHTK.norm(dim=-1).max() * key_BGTK.norm(dim=-1).max()
    assert float((found - expected).abs().max()) < 1e-6 * float(norms)
    assert float((rotated_heads(key_BGTK) - key_BGTK).norm()) > 0.3 * float(
        key_BGTK.norm()
    )


@pytest.mark.parametrize("width", [16, 128])
def test_the_rotation_is_the_hadamard_matrix(width):
    key_BGTK = heads(2, 31, width)
    expected = key_BGTK.double() @ textbook.hadamard(width)
    torch.testing.assert_close(
        rotated_heads(key_BGTK).double(), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_bits_nothing_is_touched(dtype):
    query, key = heads(6, 31, 16).to(dtype), heads(2, 31, 16).to(dtype)
    assert AS_COMPUTED.keys(query, key) == (query, key)
    assert AS_COMPUTED.values(key) is key
    x_BTI = key[0]
    assert AS_COMPUTED.inputs(x_BTI) is x_BTI
    only_inputs = ActivationQuantizer(ActivationRounding(activation_bits=4))
    assert only_inputs.keys(query, key) == (query, key)
    assert only_inputs.values(key) is key
    assert W4.inputs(x_BTI) is x_BTI


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("kv_heads", "symmetric"), [(1, True), (2, False), (6, True)])
def test_keys_and_values_are_those_of_the_textbook(kv_heads, symmetric, tokens):
    scheme = ActivationRounding(kv_bits=4, kv_symmetric=symmetric, kv_clip=0.95)
    made = ActivationQuantizer(scheme)
    # In float64, so that no value falls to the other side of an edge.
    query = heads(6, tokens, 16).double()
    key = heads(kv_heads, tokens, 16, seed=1).double()
    grid: Any = {"symmetric": symmetric, "clip": 0.95}
    found_q, found_k = made.keys(query, key)
    matrix_KK = textbook.hadamard(16)
    assert_same(found_q, query @ matrix_KK)
    assert_same(found_k, textbook.rounded(key @ matrix_KK, 4, -1, **grid))
    assert_same(made.values(key), textbook.rounded(key, 4, -1, **grid))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("width", [16, 24, 128])
@pytest.mark.parametrize("prefix", [1, 2, 31, 171])
def test_what_comes_later_changes_no_key_and_no_value(prefix, width):
    query, key = heads(6, 172, width).double(), heads(2, 172, width, seed=1).double()
    whole_q, whole_k = W4.keys(query, key)
    part_q, part_k = W4.keys(query[:, :, :prefix], key[:, :, :prefix])
    # Products of another size may differ in their last bit.
    assert_same(part_q, whole_q[:, :, :prefix])
    assert_same(part_k, whole_k[:, :, :prefix])
    part_v = W4.values(key[:, :, :prefix])
    assert torch.equal(part_v, W4.values(key)[:, :, :prefix])


@pytest.mark.parametrize("window", [None, 9])
def test_attention_reads_rounded_keys_and_values(window):
    query, key, value = heads(6, 31, 16), heads(2, 31, 16), heads(2, 31, 16, seed=2)
    module = torch.nn.Module()
    found, _ = attention(module, query, key, value, sliding_window=window, quantizer=W4)
    score = scores(*W4.keys(query, key)) / 16**0.5
    distance = torch.arange(31)[:, None] - torch.arange(31)
    hidden = (distance < 0) | (distance >= (window or 31))
    map_BHTT = score.masked_fill(hidden, -torch.inf).softmax(-1)
    value_BHTK = W4.values(value).double().repeat_interleave(3, 1)
    expected = (map_BHTT @ value_BHTK).transpose(1, 2).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    more = {"sliding_window": window, "column_sums": True}
    _, sums_BT = attention(module, query, key, value, quantizer=W4, **more)
    expected_BT = map_BHTT.sum((1, 2)).float()
    torch.testing.assert_close(sums_BT, expected_BT, rtol=1e-4, atol=1e-4)


def test_rotation_is_what_makes_few_bits_enough():
    """One large channel sets the scale of all others, unless it is spread."""
    query, key = heads(6, 172, 128), heads(2, 172, 128, seed=1)
    exact = scores(query, key)
    rotated = scores(*W4.keys(query, key)) - exact
    plain = scores(query, W4.values(key)) - exact
    assert float(rotated.norm()) < 0.5 * float(plain.norm())
