"""What the fields of token importance refuse, word for word."""

from typing import Any

import pytest

from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.demo import MODEL
from rsq_stream.errors import UsageError
from rsq_stream.planning.validate import inspect_checkpoint, require_valid_importance
from tests.config.test_quantization_plan import named, plan
from tests.support.toy import open_toy

CHUNKS = "C,C,.../T with C below T and T at most 63, such as 0,7/8"
PROJECTIONS = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
TOGETHER = "all or none of q_proj, k_proj, v_proj: they share a Hessian"
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"importance": "last-n"},
        f"--importance must be one of {', '.join(STRATEGIES)}, not last-n",
    ),
    (
        {"importance_min": -0.1},
        "--importance-min must be 0 to importance-max (1.0), not -0.1",
    ),
    (
        {"importance_min": 1.1},
        "--importance-min must be 0 to importance-max (1.0), not 1.1",
    ),
    (
        {"importance_min": float("nan")},
        "--importance-min must be 0 to importance-max (1.0), not nan",
    ),
    (
        {"importance_min": 0.0, "importance_max": 0.0},
        "--importance-max must be above 0 and finite, not 0.0",
    ),
    (
        {"importance": "first-n", "importance_tokens": 0},
        "--importance-tokens must be 1 to the sequence length (63), not 0",
    ),
    (
        {"importance": "first-n", "importance_tokens": 64},
        "--importance-tokens must be 1 to the sequence length (63), not 64",
    ),
    (
        {"importance": "first-last-n", "importance_tokens": 0},
        "--importance-tokens must be 1 to the sequence length (63), not 0",
    ),
    ({"importance_power": 3}, "--importance-power must be 1 or 2, not 3"),
    (
        {"importance_visible": "all"},
        "--importance-visible must be one of no, linear, root, not all",
    ),
    (
        {"importance_transform": "sqrt"},
        "--importance-transform must be one of no, log, rank, not sqrt",
    ),
    (
        {"importance_quantile": 0.5},
        "--importance-quantile must be 0 to less than 0.5, not 0.5",
    ),
    ({"importance_mask": 1.0}, "--importance-mask must be 0 to less than 1, not 1.0"),
    (
        {"importance_truncate": -0.1},
        "--importance-truncate must be 0 to less than 1, not -0.1",
    ),
    ({"importance_skip": 63}, "--importance-skip must be 0 to 62, not 63"),
    ({"importance_bins": 1}, "--importance-bins must be 2 or more, or 0, not 1"),
    (
        {"importance_linears": ("down",)},
        f"--importance-linears must be one of {PROJECTIONS}, not down",
    ),
    (
        {"importance_linears": ("k_proj", "q_proj")},
        f"--importance-linears must be {TOGETHER}, not k_proj q_proj",
    ),
    *(
        (
            {"importance": "chunks", "importance_chunks": text},
            f"--importance-chunks must be {CHUNKS}, not {text or 'nothing'}",
        )
        for text in ("", "0", "8/8", "0/64", "-1/8", "0,/8", "/8", "0/0", "1.5/8")
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[named(changes) for changes, _ in REFUSED]
)
def test_a_plan_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        require_valid_importance(plan(**changes), inspect_checkpoint(open_toy(MODEL)))
    assert str(caught.value) == message


def test_places_become_ranges() -> None:
    made = plan(importance="chunks", importance_chunks="0,7/8")
    assert ranges(made) == [(0, 7), (55, 63)]
    made = plan(importance="first-last-n", importance_tokens=5)
    assert ranges(made) == [(0, 5), (58, 63)]
    assert ranges(plan(importance="first-n", importance_tokens=5)) == [(0, 5)]
    assert ranges(plan(importance="uniform")) == [(0, 63)]


def ranges(plan: QuantizationPlan) -> list[tuple[int, int]]:
    by_place = STRATEGIES[plan.importance].ranges
    assert by_place is not None
    return by_place(plan, plan.sequence_length)


@pytest.mark.parametrize(
    ("name", "length", "tokens"),
    [
        ("first-n", 63, 15),
        ("first-n", 2, 1),
        ("first-last-n", 63, 7),
        ("first-last-n", 4096, 512),
        ("uniform", 63, 0),
        ("attncon", 63, 0),
    ],
)
def test_default_number_of_tokens(name: str, length: int, tokens: int) -> None:
    assert STRATEGIES[name].default_tokens(length) == tokens
