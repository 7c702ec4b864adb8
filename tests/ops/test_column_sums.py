"""Attention and its column sums, tile by tile, against the whole map in float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rsq_stream.model.attention import attention
from rsq_stream.ops.column_sums import column_sums

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TINY = 1e-6
SCALING = 0.3

each_device = pytest.mark.parametrize("device", DEVICES)
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
each_window = pytest.mark.parametrize("window", [None, 1, 20, 63, 300])
# 300 tokens are three tiles of the sums, and the last one is not full.
each_size = pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"),
    [(1, 1, 1, 1), (63, 6, 2, 26), (137, 4, 4, 16), (172, 5, 1, 63), (300, 6, 3, 8)],
    ids=lambda number: str(number),
)


class Heads(NamedTuple):
    query_BHTK: Tensor
    key_BGTK: Tensor
    value_BGTK: Tensor


def random_heads(
    tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Heads:
    generator = torch.Generator().manual_seed(tokens)
    counts = (heads, kv_heads, kv_heads)
    made = [torch.randn(2, n, tokens, width, generator=generator) for n in counts]
    return Heads(*(x.to(dtype) for x in made))


def eager_map(heads: Heads, window: int | None, dtype: torch.dtype) -> Tensor:
    """The whole softmax map, ``[B, H, T, T]``."""
    query, key = heads.query_BHTK.to(dtype), heads.key_BGTK.to(dtype)
    tokens = query.shape[2]
    hidden = torch.ones(tokens, tokens).triu(1).bool()
    if window is not None:
        hidden |= torch.ones(tokens, tokens).tril(-window).bool()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    score = (query @ key.mT * SCALING).masked_fill(hidden, -torch.inf)
    return score.softmax(-1)


def worst(error: Tensor) -> float:
    return float(error.double().abs().max())


@each_device
@each_window
@each_size
@each_type
def test_sums_keep_to_the_budget(tokens, heads, kv_heads, width, window, device, dtype):
    made = random_heads(tokens, heads, kv_heads, width, dtype)
    exact_BT = eager_map(made, window, torch.float64).sum((1, 2))
    naive_BT = eager_map(made, window, torch.float32).sum((1, 2))
    query, key = made.query_BHTK.to(device), made.key_BGTK.to(device)
    found_BT = column_sums(query, key, SCALING, window).cpu()
    assert found_BT.dtype == torch.float32
    tiny = TINY * worst(exact_BT)
    assert worst(found_BT - exact_BT) <= 2 * worst(naive_BT - exact_BT) + tiny


@each_device
@each_window
@each_size
@each_type
def test_sums_add_up_to_heads_times_tokens(
    tokens, heads, kv_heads, width, window, device, dtype
):
    made = random_heads(tokens, heads, kv_heads, width, dtype)
    # Scores in the hundreds: nearly all of the mass on one key, and none lost.
    for factor in (0.0, 1.0, 100.0):
        query, key = factor * made.query_BHTK.to(device), made.key_BGTK.to(device)
        sums_BT = column_sums(query, key, SCALING, window)
        assert bool((sums_BT >= 0).all())
        total_B = sums_BT.double().sum(1).cpu()
        expected_B = torch.full_like(total_B, heads * tokens)
        torch.testing.assert_close(total_B, expected_B, rtol=1e-6, atol=0)


@each_device
@each_size
def test_window_of_one_sees_only_itself(tokens, heads, kv_heads, width, device):
    made = random_heads(tokens, heads, kv_heads, width)
    query, key = made.query_BHTK.to(device), made.key_BGTK.to(device)
    sums_BT = column_sums(query, key, SCALING, window=1)
    assert torch.equal(sums_BT, torch.full_like(sums_BT, heads))


@each_device
@pytest.mark.parametrize("tokens", [63, 137])
def test_sums_of_equal_keys_are_harmonic(tokens, device):
    """Query i spreads 1 / (i + 1) over all it sees."""
    query = torch.zeros(1, 3, tokens, 8, device=device)
    sums_T = column_sums(query, torch.ones_like(query), SCALING)[0].cpu()
    share_T = 1 / torch.arange(1, tokens + 1, dtype=torch.float64)
    expected_T = 3 * share_T.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(sums_T.double(), expected_T, rtol=1e-6, atol=0)


def test_sums_of_low_precision_are_those_of_its_values():
    """On a GPU tensor cores have them: see the budget."""
    made = random_heads(137, 6, 2, 16)
    query, key = (x.bfloat16() for x in made[:2])
    found_BT = column_sums(query, key, SCALING)
    expected_BT = column_sums(query.float(), key.float(), SCALING)
    assert torch.equal(found_BT, expected_BT)


@each_device
@each_window
@each_size
def test_attention_keeps_to_the_budget(
    tokens, heads, kv_heads, width, window, device, monkeypatch
):
    monkeypatch.setattr("rsq_stream.model.attention._QUERIES", 32)
    made = random_heads(tokens, heads, kv_heads, width)

    def naive(dtype: torch.dtype) -> Tensor:
        value = made.value_BGTK.to(dtype).repeat_interleave(heads // kv_heads, dim=1)
        return (eager_map(made, window, dtype) @ value).transpose(1, 2)

    exact_BTHK = naive(torch.float64)
    query, key, value = (x.to(device) for x in made)
    found_BTHK, nothing = attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        scaling=SCALING,
        sliding_window=window,
    )
    assert nothing is None
    budget = 2 * worst(naive(torch.float32) - exact_BTHK) + TINY
    assert worst(found_BTHK.cpu() - exact_BTHK) <= budget


@each_device
def test_attention_gives_the_sums_if_asked(device):
    query, key, value = (x.to(device) for x in random_heads(63, 6, 2, 16))
    for window in (None, 20):
        placeholder, sums_BT = attention(
            torch.nn.Identity(),
            query,
            key,
            value,
            sliding_window=window,
            column_sums=True,
        )
        assert placeholder.shape == (2, 63, 6, 16)
        assert sums_BT is not None
        assert torch.equal(sums_BT, column_sums(query, key, 16**-0.5, window))
