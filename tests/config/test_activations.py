"""What the fields of rounded activations refuse, and how they are read and changed."""

import dataclasses
from typing import Any

import pytest

from rsq_stream.config.activations import NOTHING, ActivationRounding
from rsq_stream.errors import UsageError
from tests.config.test_quantization_plan import named, plan

OFF = {"activation_bits": 16, "kv_bits": 16}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"activation_bits": 1}, "--activation-bits must be 2 to 8, or 16 for none, not 1"),
    ({"activation_bits": 9}, "--activation-bits must be 2 to 8, or 16 for none, not 9"),
    ({"kv_bits": 0}, "--kv-bits must be 2 to 8, or 16 for none, not 0"),
    (
        {"activation_clip": 0.0},
        "--activation-clip must be above 0, at most 1, not 0.0",
    ),
    ({"kv_clip": 1.01}, "--kv-clip must be above 0, at most 1, not 1.01"),
    ({"kv_clip": float("nan")}, "--kv-clip must be above 0, at most 1, not nan"),
    (
        {"activation_group_size": 0},
        "--activation-group-size must be -1, 2 or more, not 0",
    ),
    (
        {"activation_group_size": 1},
        "--activation-group-size must be -1, 2 or more, not 1",
    ),
    (OFF | {"activation_clip": 0.9}, "--activation-clip needs --activation-bits"),
    (
        OFF | {"activation_group_size": 32},
        "--activation-group-size needs --activation-bits",
    ),
    (
        OFF | {"activation_symmetric": False},
        "--activation-asymmetric needs --activation-bits",
    ),
    (OFF | {"kv_clip": 0.9}, "--kv-clip needs --kv-bits"),
    (OFF | {"kv_symmetric": False}, "--kv-asymmetric needs --kv-bits"),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[named(changes) for changes, _ in REFUSED]
)
def test_plans_and_schemes_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(**changes)
    assert str(caught.value) == message
    whole = {"activation_bits": 4, "kv_bits": 4} | changes
    with pytest.raises(UsageError) as caught:
        ActivationRounding(**whole)
    assert str(caught.value) == message


@pytest.mark.parametrize("bits", [*range(2, 9), 16])
def test_bits_that_exist(bits: int) -> None:
    made = ActivationRounding(activation_bits=bits, kv_bits=bits)
    assert made.rounds_activations == (bits != 16)
    assert plan(activation_bits=bits, kv_bits=bits).rounds_activations == (bits != 16)


def test_groups_must_be_whole() -> None:
    inputs = {"self_attn.q_proj": 96, "mlp.down_proj": 172}
    for size in (-1, 2, 4):
        made = ActivationRounding(activation_bits=4, activation_group_size=size)
        made.require_whole_groups(inputs)
    made = ActivationRounding(activation_bits=4, activation_group_size=32)
    with pytest.raises(UsageError) as caught:
        made.require_whole_groups(inputs)
    assert str(caught.value) == (
        "--activation-group-size must be -1 or a divisor of the 172 inputs of"
        " mlp.down_proj, not 32"
    )


def test_a_scheme_is_taken_from_a_plan_and_from_an_older_one() -> None:
    made = plan(activation_clip=0.9, kv_bits=3)
    fields = {name: getattr(made, name) for name in PLAN_NAMES}
    scheme = ActivationRounding.from_fields(fields | {"method": "rsq"})
    assert scheme == ActivationRounding(
        activation_bits=4, activation_clip=0.9, kv_bits=3
    )
    assert ActivationRounding.from_fields({"method": "rsq"}) == NOTHING


PLAN_NAMES = [field.name for field in dataclasses.fields(ActivationRounding)]


def test_what_is_given_replaces_and_16_bits_switch_off() -> None:
    made = ActivationRounding(activation_bits=4, activation_clip=0.9, kv_bits=4)
    given: dict[str, Any] = dict.fromkeys(PLAN_NAMES)
    assert made.changed(given) == made
    changed = made.changed(given | {"kv_clip": 0.95, "kv_symmetric": False})
    expected: dict[str, Any] = {"kv_bits": 4, "kv_clip": 0.95, "kv_symmetric": False}
    assert changed == ActivationRounding(
        activation_bits=4, activation_clip=0.9, **expected
    )
    assert made.changed({"activation_bits": 16}) == ActivationRounding(kv_bits=4)
    assert made.changed(OFF) == NOTHING
    with pytest.raises(UsageError, match="--activation-clip needs --activation-bits"):
        made.changed({"activation_bits": 16, "activation_clip": 0.8})
    with pytest.raises(UsageError, match="--kv-clip needs --kv-bits"):
        NOTHING.changed({"kv_clip": 0.8})


def test_words() -> None:
    made = ActivationRounding(activation_bits=4, activation_group_size=64, kv_bits=3)
    assert NOTHING.activations_text() == "nothing"
    assert made.activations_text() == (
        "4-bit inputs of linears, symmetric, groups of 64; 3-bit K and V, symmetric"
    )
    made = ActivationRounding(kv_bits=4, kv_symmetric=False, kv_clip=0.95)
    assert made.activations_text() == "4-bit K and V, asymmetric, clip 0.95"
