"""Each strategy against its formula in float64; each option at its edges."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.algorithm.importance._weighting import (
    Weighting,
    affine,
    binned,
    seen,
    transformed,
)
from rsq_stream.algorithm.importance.actdiff import steadiness
from rsq_stream.algorithm.importance.actnorm import norm
from rsq_stream.algorithm.importance.cluster import cluster_distance
from rsq_stream.algorithm.importance.tokenfreq import rarity
from rsq_stream.algorithm.importance.tokensim import dissimilarity
from rsq_stream.calibration.windows import Windows
from rsq_stream.errors import Interrupted
from rsq_stream.events import Event, StageStarted
from rsq_stream.output.verify import verify
from rsq_stream.pipeline.token_importance import make_importance
from tests.config.test_quantization_plan import plan
from tests.pipeline.test_resume import RUN, SMALL
from tests.support.toy import (
    contents,
    decoded_state,
    linear_names,
    open_toy,
    run_toy,
    toy_checkpoint,
)

each_shape = pytest.mark.parametrize("shape", [(1, 1, 5), (3, 63, 8), (2, 137, 64)])


def random(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x_BTD = torch.randn(shape, generator=generator)
    x_BTD[:, 0] *= 30  # a sink
    return x_BTD


@each_shape
def test_norms(shape: tuple[int, int, int]) -> None:
    x_BTD, output_BTD = random(shape), random(shape).flip(1) + 3
    exact = x_BTD.double().square().sum(-1).sqrt()
    torch.testing.assert_close(norm(x_BTD).double(), exact, rtol=1e-6, atol=0)
    exact = -(output_BTD.double() - x_BTD.double()).square().sum(-1).sqrt()
    found = steadiness(x_BTD, output_BTD)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@each_shape
def test_dissimilarity_is_the_mean_over_all_pairs(shape: tuple[int, int, int]) -> None:
    x_BTD = random(shape)
    x64_BTD = x_BTD.double() + 100  # a common offset changes nothing
    pairs_BTT = (x64_BTD[:, :, None] - x64_BTD[:, None]).square().sum(-1)
    exact_BT = pairs_BTT.mean(-1)
    found_BT = dissimilarity((x_BTD.double() + 100).float())
    torch.testing.assert_close(found_BT.double(), exact_BT, rtol=1e-4, atol=1e-4)


def test_rarity_counts_this_token_in_all_windows() -> None:
    """The reference looked up another sequence's frequencies."""
    window_BT = torch.tensor([[1, 1, 2, 3], [1, 3, 3, 3], [4, 4, 4, 4]])
    made = make_importance(
        plan(importance="tokenfreq", unit_sequences=2, expand=2), Windows(window_BT, 2)
    )
    assert made.count_V is not None
    assert made.count_V.tolist() == [0, 6, 2, 8, 8]
    # Unit 1 holds window 1 and its rolled copy.
    token_BT = made.windows.tokens(2, 2)
    assert token_BT.tolist() == [[1, 3, 3, 3], [3, 3, 1, 3]]
    scores = rarity(token_BT, made.count_V)
    assert scores.tolist() == [[-6, -8, -8, -8], [-8, -8, -6, -8]]


@each_shape
def test_cluster_distance_is_that_of_k_means(shape: tuple[int, int, int]) -> None:
    """Thirty steps in float64, token by token."""
    x_BTD = random(shape)
    found_BT = cluster_distance(x_BTD)
    for x_TD, found_T in zip(x_BTD.double(), found_BT.double(), strict=True):
        tokens = len(x_TD)
        count = max(1, tokens // 8)
        centres = [x_TD[k * tokens // count] for k in range(count)]
        for _ in range(30):
            nearest = [
                int(torch.stack([(x - c).norm() for c in centres]).argmin())
                for x in x_TD
            ]
            for k in range(count):
                members = [x for x, n in zip(x_TD, nearest, strict=True) if n == k]
                centres[k] = torch.stack(members).mean(0) if members else centres[k]
        exact = [min((x - centre).norm() for centre in centres) for x in x_TD]
        torch.testing.assert_close(found_T, torch.stack(exact), rtol=1e-4, atol=1e-4)


def test_seen_divides_by_the_queries() -> None:
    score_BT = torch.ones(2, 5)
    assert seen(score_BT, "no") is score_BT
    found = seen(score_BT, "linear")[0].double()
    torch.testing.assert_close(
        found, 1 / torch.arange(5, 0, -1).double(), rtol=1e-6, atol=0
    )
    root = seen(score_BT, "root")[1].double()
    torch.testing.assert_close(root, found.sqrt(), rtol=1e-6, atol=0)


def test_ranks_count_smaller_ones_and_earlier_equals() -> None:
    score_BT = torch.tensor([[3.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert transformed(score_BT, "rank").tolist() == [[2, 0, 3, 1], [0, 1, 2, 3]]


def test_logs_keep_the_order_and_take_the_scale() -> None:
    score_BT = random((3, 63, 1))[..., 0]
    found_BT = transformed(score_BT, "log")
    assert torch.equal(found_BT.argsort(1), score_BT.argsort(1))
    above = score_BT.double() - score_BT.double().amin(1, keepdim=True)
    exact = (above + above.median(1, keepdim=True).values).log()
    torch.testing.assert_close(found_BT.double(), exact, rtol=1e-4, atol=1e-5)
    assert bool(transformed(torch.full((1, 7), 3.0), "log").isfinite().all())


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.25, 0.49])
@pytest.mark.parametrize("skip", [0, 1, 5, 62])
def test_bounds_of_the_affine_map(quantile: float, skip: int) -> None:
    score_BT = random((3, 63, 1))[..., 0]
    found_BT = affine(score_BT, 0.1, 2.0, quantile=quantile, skip=skip)
    for score_T, found_T in zip(score_BT.double(), found_BT.double(), strict=True):
        ordered = score_T.sort().values
        low = round(quantile * 62)
        high = max(62 - low - skip, low)
        span = float(ordered[high] - ordered[low])
        share_T = ((score_T - ordered[low]) / span) if span > 0 else torch.ones(63)
        exact_T = 0.1 + 1.9 * share_T.double().clamp(0, 1)
        torch.testing.assert_close(found_T, exact_T, rtol=1e-4, atol=1e-5)


def test_bins_are_equal_shares() -> None:
    score_BT = random((2, 100, 1))[..., 0]
    for bins in (2, 4, 100):
        found_BT = binned(score_BT, bins, 0.5, 1.0)
        values, counts = found_BT[0].unique(return_counts=True)
        assert counts.tolist() == [100 // bins] * bins
        expected = torch.linspace(0.5, 1.0, bins)
        torch.testing.assert_close(values, expected)
        by_score = found_BT.gather(1, score_BT.argsort(1))
        assert bool((by_score.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_mask_and_truncate(share: float) -> None:
    score_BT = random((2, 100, 1))[..., 0]
    plain = Weighting(minimum=0.5).weights(score_BT)
    masked = Weighting(minimum=0.5, mask=share).weights(score_BT)
    cut = Weighting(minimum=0.5, truncate=share).weights(score_BT)
    dropped = round(share * 100)
    if dropped == 0:
        assert torch.equal(masked, plain)
        assert torch.equal(cut, plain)
        return
    lowest = score_BT.argsort(1)[:, :dropped]
    for found in (masked, cut):
        assert bool((found.gather(1, lowest) == 0).all())
        assert int((found == 0).sum()) == 2 * dropped
        assert abs(float(found.mean()) - 1) < 0.01
    kept = masked[masked > 0]
    assert float(kept.min()) == float(kept.max())


def test_the_mask_comes_before_the_cut_and_the_bins() -> None:
    score_BT = random((2, 100, 1))[..., 0]
    for alone, more in (
        (Weighting(mask=0.3), Weighting(mask=0.3, truncate=0.5, bins=4)),
        (Weighting(truncate=0.5), Weighting(truncate=0.5, bins=4)),
    ):
        assert torch.equal(more.weights(score_BT), alone.weights(score_BT))


def test_power_two_squares_before_the_mean() -> None:
    score_BT = random((3, 63, 1))[..., 0]
    r_BT = affine(score_BT, 0.05, 1.0).double()
    exact_BT = r_BT.square() / r_BT.square().mean(1, keepdim=True)
    found_BT = Weighting(minimum=0.05, power=2).weights(score_BT).double()
    torch.testing.assert_close(found_BT, exact_BT, rtol=2**-7, atol=0)


def test_reverse_is_the_negative() -> None:
    score_BT = random((3, 63, 1))[..., 0]
    assert torch.equal(
        Weighting(reverse=True).weights(score_BT), Weighting().weights(-score_BT)
    )


LEAST = {"importance_min": 0.05}
"""The default, 20 tokens, is all of a toy's window."""


def settings_of(kind: str) -> dict[str, Any]:
    """Return settings of a toy run by a strategy, with the option that it must have."""
    chunks = {"importance_chunks": "0,2/4"} if STRATEGIES[kind].takes_chunks else {}
    return RUN | {"importance": kind} | chunks | LEAST


EVERY: dict[str, Any] = {"transform": "log", "visible": "root", "power": 2}


@pytest.mark.parametrize(
    "options", [{}, {"skip": 4}, {"quantile": 0.2}, {"bins": 3}, {"mask": 0.5}, EVERY]
)
def test_constant_scores_are_no_error(options: dict[str, Any]) -> None:
    """The reference divides by zero here."""
    weight_BT = Weighting(minimum=0.1, **options).weights(torch.full((2, 9), 7.0))
    assert bool(weight_BT.isfinite().all())
    assert abs(float(weight_BT.mean()) - 1) < 0.01


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("scores") / "toy", **SMALL)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_each_strategy_runs_and_matters(toy: Path, tmp_path: Path, kind: str) -> None:
    settings = settings_of(kind) | {"expand": 2}
    run_toy(toy, tmp_path / "out", **settings)
    assert not verify(tmp_path / "out", open_toy(toy)).problems
    run_toy(toy, tmp_path / "even", **settings | {"importance": "uniform"})
    weighed, even = decoded_state(tmp_path / "out"), decoded_state(tmp_path / "even")
    same = all(torch.equal(weighed[name], even[name]) for name in weighed)
    assert same == (kind == "uniform")


@pytest.mark.parametrize("kind", STRATEGIES)
def test_each_strategy_goes_on_where_it_stopped(
    toy: Path, tmp_path: Path, kind: str
) -> None:
    """Token weights are kept with the first stage, and picked up for the others."""
    settings, stop = settings_of(kind), threading.Event()
    run_toy(toy, tmp_path / "whole", **settings)

    def listener(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "attention out":
            stop.set()

    with pytest.raises(Interrupted):
        run_toy(toy, tmp_path / "out", **settings, listener=listener, stop=stop)
    run_toy(toy, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_some_linears_alone(toy: Path, tmp_path: Path) -> None:
    """down weighed alone: the stages before it are those of even tokens."""
    own = LEAST | {"importance_linears": ("down_proj",)}
    run_toy(toy, tmp_path / "own", **RUN | own)
    run_toy(toy, tmp_path / "even", **RUN | {"importance": "uniform"})
    own_state, even = decoded_state(tmp_path / "own"), decoded_state(tmp_path / "even")
    names = [f"{name}.weight" for name in linear_names(1)]
    same = [torch.equal(own_state[name], even[name]) for name in names]
    assert same == [True] * 6 + [False]
