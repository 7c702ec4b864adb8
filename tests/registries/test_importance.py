"""A strategy is one entry of the registry: no other file has to know it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.algorithm.importance.base import Need, Options, Ranges, Seen, Strategy
from rsq_stream.errors import UsageError
from rsq_stream.output.verify import verify
from rsq_stream.planning.machine_speed import MachineSpeed
from rsq_stream.planning.memory.forward import forward_bytes
from rsq_stream.planning.time_estimate import predict
from rsq_stream.planning.validate import inspect_checkpoint
from tests.pipeline.test_resume import RUN, SMALL
from tests.planning.test_time_estimate import NEVER
from tests.support.cli_runs import run_program
from tests.support.toy import (
    STAGES,
    decoded_state,
    execution_for,
    open_toy,
    options_for,
    plan_toy,
    run_toy,
    toy_checkpoint,
)

LEAST = {"importance_min": 0.05}


def odd_tokens_first(seen: Seen) -> Float[Tensor, "B T"]:
    """Score odd token ids higher, and look at all that there is to see."""
    assert seen.attention_BT is not None
    assert seen.output_BTD is not None
    assert seen.token_BT is not None
    assert seen.count_V is not None
    sequences, tokens, _ = seen.x_BTD.shape
    received = torch.full((sequences,), float(tokens * SMALL["heads"]))
    torch.testing.assert_close(seen.attention_BT.sum(1), received)
    assert seen.output_BTD.shape == seen.x_BTD.shape
    assert not torch.equal(seen.output_BTD, seen.x_BTD)
    assert int(seen.count_V.sum()) == 5 * tokens
    assert bool((seen.count_V[seen.token_BT] > 0).all())
    return (seen.token_BT % 2).float()


def last_n(options: Options, sequence_length: int) -> Ranges:
    return [(sequence_length - options.importance_tokens, sequence_length)]


ODD = Strategy(
    help="odd tokens first",
    score=odd_tokens_first,
    needs=("attention", "block_output", "counts"),
)
LAST = Strategy(help="the last tokens alone", ranges=last_n, tokens_share=1 / 2)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("registry") / "toy", **SMALL)


@pytest.fixture
def added() -> Iterator[None]:
    STRATEGIES.add("odd", ODD)
    STRATEGIES.add("last-n", LAST)
    yield
    STRATEGIES.remove("odd")
    STRATEGIES.remove("last-n")


@pytest.mark.usefixtures("added")
def test_a_strategy_of_scores_needs_no_other_file(toy: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = RUN | LEAST
    run_toy(toy, tmp_path / "odd", **settings, importance="odd")
    assert verify(tmp_path / "odd", open_toy(toy)).problems == []
    run_toy(toy, tmp_path / "even", **settings, importance="uniform")
    odd, even = decoded_state(tmp_path / "odd"), decoded_state(tmp_path / "even")
    assert any(not torch.equal(odd[name], even[name]) for name in odd)


@pytest.mark.usefixtures("added")
def test_a_strategy_by_place_needs_no_other_file(toy: Path, tmp_path: Path) -> None:
    """The last half, its default, is the second of two chunks."""
    run_toy(toy, tmp_path / "last", **RUN, importance="last-n")
    chunks: dict[str, Any] = {"importance": "chunks", "importance_chunks": "1/2"}
    run_toy(toy, tmp_path / "half", **RUN, **chunks)
    last, half = decoded_state(tmp_path / "last"), decoded_state(tmp_path / "half")
    assert all(torch.equal(last[name], half[name]) for name in half)
    message = r"^--importance-tokens must be 1 to the sequence length \(16\), not 17$"
    with pytest.raises(UsageError, match=message):
        plan_toy(toy, sequence_length=16, importance="last-n", importance_tokens=17)


@pytest.mark.usefixtures("added")
def test_memory_and_time_follow_from_what_a_strategy_needs(
    toy: Path, tmp_path: Path
) -> None:
    architecture = inspect_checkpoint(open_toy(toy))
    rates = MachineSpeed(**NEVER | {"sums": 1e6, "scores": 1e6})
    taken, seconds = {}, {}
    for name in ("uniform", "last-n", "actnorm", "attncon", "actdiff", "odd"):
        plan, _ = plan_toy(toy, sequence_length=16, importance=name)
        taken[name] = forward_bytes(architecture, plan, STAGES[0], 4, on_gpu=False)
        execution = execution_for(toy, plan, options_for(tmp_path / "out"))
        stages = predict(architecture, plan, execution, rates, on_gpu=False).stages
        seconds[name] = stages["attention in: pass"]
    assert taken["uniform"] == taken["last-n"] < taken["actnorm"] == taken["actdiff"]
    assert taken["odd"] == max(taken["attncon"], taken["actdiff"])
    assert seconds["uniform"] == seconds["last-n"] == seconds["actnorm"] == 0
    assert seconds["attncon"] == seconds["actdiff"] == seconds["odd"] / 2 > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_sees_what_it_needs_and_scores_each_token(name: str) -> None:
    strategy = STRATEGIES[name]
    assert strategy.help
    if strategy.score is None:
        assert strategy.needs == ()
        return
    needs: dict[Need, dict[str, Tensor]] = {
        "attention": {"attention_BT": torch.rand(2, 16)},
        "block_output": {"output_BTD": torch.randn(2, 16, 8)},
        "counts": {
            "token_BT": torch.arange(32).reshape(2, 16),
            "count_V": torch.arange(32),
        },
    }
    computed = {k: v for need in strategy.needs for k, v in needs[need].items()}
    score_BT = strategy.score(Seen(x_BTD=torch.randn(2, 16, 8), **computed))
    assert score_BT.shape == (2, 16)
    assert score_BT.dtype == torch.float32
    assert int(score_BT.unique().numel()) > 16
    for need in strategy.needs:
        fewer = {k: v for k, v in computed.items() if k not in needs[need]}
        with pytest.raises(AssertionError):
            strategy.score(Seen(x_BTD=torch.randn(2, 16, 8), **fewer))


def test_a_strategy_has_a_score_or_ranges() -> None:
    with pytest.raises(TypeError, match="either a score or ranges"):
        Strategy(help="neither")
    with pytest.raises(TypeError, match="either a score or ranges"):
        Strategy(help="both", score=odd_tokens_first, ranges=last_n)


def test_names_are_listed_without_torch() -> None:
    program = (
        "import sys\n"
        "from rsq_stream.algorithm.importance import STRATEGIES\n"
        "print(*STRATEGIES)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = run_program(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(STRATEGIES)
    assert {"attncon", "actnorm-output", "first-last-n"} < set(STRATEGIES)
