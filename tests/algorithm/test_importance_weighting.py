"""Token weights against the formulas in float64."""

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.importance._positions import chosen_tokens
from rsq_stream.algorithm.importance._weighting import (
    Weighting,
    affine,
    lowest,
    mean_one,
    rounded,
    transformed,
)
from tests.support.textbook import token_weights

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_size = pytest.mark.parametrize(
    ("sequences", "tokens"), [(1, 1), (1, 63), (3, 137), (63, 2), (2, 172)]
)
each_range = pytest.mark.parametrize(
    ("minimum", "maximum"), [(0.005, 1.0), (0.0, 1.0), (0.3, 0.3), (1.0, 7.0)]
)
ULP = 2.0**-23


def random_scores(sequences: int, tokens: int) -> Tensor:
    """Like column sums: positive, one large first token, the others far smaller."""
    generator = torch.Generator().manual_seed(sequences + tokens)
    score_BT = torch.rand(sequences, tokens, generator=generator) + 0.1
    score_BT[:, 0] *= 50
    return score_BT


@each_device
@each_range
@each_size
def test_affine_is_the_formula(sequences, tokens, minimum, maximum, device):
    score_BT = random_scores(sequences, tokens)
    found_BT = affine(score_BT.to(device), minimum, maximum).cpu()
    exact_BT = score_BT.double()
    low_B1, high_B1 = exact_BT.amin(1, keepdim=True), exact_BT.amax(1, keepdim=True)
    if tokens == 1:
        expected_BT = torch.full_like(exact_BT, maximum)
    else:
        share_BT = (exact_BT - low_B1) / (high_B1 - low_B1)
        expected_BT = minimum + (maximum - minimum) * share_BT
    error_BT = (found_BT.double() - expected_BT).abs()
    assert float(error_BT.max()) <= 4 * ULP * maximum
    # The order of tokens is that of their scores.
    by_score = score_BT.argsort(dim=1)
    assert bool((found_BT.gather(1, by_score).diff(dim=1) >= 0).all())


@each_device
@each_range
@pytest.mark.parametrize("constant", [0.0, 0.1, 7.0, -3.0, 1e-30])
@pytest.mark.parametrize("tokens", [1, 63, 137])
def test_constant_scores_weigh_all_tokens_one(
    tokens, constant, minimum, maximum, device
):
    score_BT = torch.full((2, tokens), constant, device=device)
    score_BT[0] *= 2
    spread_BT = affine(score_BT, minimum, maximum)
    expected_BT = torch.full_like(spread_BT, maximum)
    torch.testing.assert_close(spread_BT, expected_BT, rtol=2 * ULP, atol=0)
    assert torch.equal(rounded(mean_one(spread_BT)), torch.ones_like(spread_BT))


@each_device
def test_affine_takes_each_sequence_by_itself(device):
    score_BT = random_scores(3, 137).to(device)
    whole_BT = affine(score_BT, 0.005, 1.0)
    for index in range(3):
        assert torch.equal(
            affine(score_BT[index : index + 1], 0.005, 1.0)[0], whole_BT[index]
        )
    # Neither the level nor the scale of the scores matters: exact powers of two.
    assert torch.equal(affine(score_BT * 8, 0.005, 1.0), whole_BT)


@each_device
@each_size
def test_mean_is_one(sequences, tokens, device):
    weight_BT = random_scores(sequences, tokens)
    found_BT = mean_one(weight_BT.to(device)).cpu()
    exact_BT = weight_BT.double() / weight_BT.double().mean(1, keepdim=True)
    torch.testing.assert_close(found_BT.double(), exact_BT, rtol=4 * ULP, atol=0)
    means_B = found_BT.double().mean(1)
    assert float((means_B - 1).abs().max()) <= 4 * ULP


@pytest.mark.parametrize("sequences", [1, 3])
def test_chosen_tokens(sequences):
    weight_BT = chosen_tokens(sequences, 63, [(0, 5), (60, 63)])
    assert weight_BT.dtype == torch.float32
    assert weight_BT.is_contiguous()
    assert weight_BT.tolist() == [[1.0] * 5 + [0.0] * 55 + [1.0] * 3] * sequences
    # With mean one, that is all the weight on the tokens that were chosen.
    expected = torch.tensor(63 / 8).expand(sequences, 5)
    torch.testing.assert_close(mean_one(weight_BT)[:, :5], expected)


@each_device
def test_rounded_is_bfloat16(device):
    weight_BT = random_scores(63, 137).to(device)
    found_BT = rounded(weight_BT)
    assert found_BT.dtype == torch.float32
    assert torch.equal(found_BT, found_BT.bfloat16().float())
    assert torch.equal(rounded(found_BT), found_BT)
    error_BT = (found_BT - weight_BT).abs() / weight_BT
    assert 0 < float(error_BT.max()) <= 2.0**-8


@each_device
@pytest.mark.parametrize(("minimum", "maximum"), [(0.005, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("tokens", [2, 63, 137])
def test_weights_are_those_of_the_textbook(tokens, minimum, maximum, device):
    sums_BT = random_scores(3, tokens)
    weighting = Weighting(minimum=minimum, maximum=maximum)
    found_BT = weighting.weights(sums_BT.to(device)).cpu().double()
    expected_BT = token_weights(sums_BT, minimum, maximum)
    # A weight half way between two bfloat16 may fall to either side.
    torch.testing.assert_close(found_BT, expected_BT, rtol=2.0**-7, atol=0)
    assert float((found_BT == expected_BT).double().mean()) >= 0.99


@each_range
@each_size
def test_exact_weights_are_the_formula(sequences, tokens, minimum, maximum):
    score_BT = random_scores(sequences, tokens)
    options = {"minimum": minimum, "maximum": maximum}
    found_BT = Weighting(**options, exact=True).weights(score_BT)
    expected_BT = token_weights(score_BT, minimum, maximum, exact=True)
    torch.testing.assert_close(found_BT.double(), expected_BT, rtol=1e-5, atol=1e-6)
    assert torch.equal(rounded(found_BT), Weighting(**options).weights(score_BT))


@each_device
@pytest.mark.parametrize("tokens", [1, 2, 7, 8])
def test_log_takes_the_lower_median(tokens, device):
    """CUDA has no deterministic median, and runs allow nothing else there."""
    score_BT = random_scores(3, tokens).to(device)
    above_BT = score_BT - score_BT.amin(1, keepdim=True)
    middle_B1 = above_BT.cpu().median(1, keepdim=True).values.to(device)
    tiny = torch.finfo(score_BT.dtype).tiny
    expected_BT = (above_BT + middle_B1.clamp(min=tiny)).log()
    assert torch.equal(transformed(score_BT, "log"), expected_BT)


@each_device
@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (0.99, 7), (0.0, 0)])
def test_the_lowest_are_never_all(share, count, device):
    score_BT = random_scores(2, 8).to(device)
    assert lowest(score_BT, share).sum(1).tolist() == [count, count]
