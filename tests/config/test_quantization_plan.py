"""What a plan refuses, word for word, and what its hash stands for."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.run_options import RunOptions
from rsq_stream.config.schemes import GROUP_SIZES, Scheme
from rsq_stream.errors import RsqError, UsageError

PLAN: dict[str, Any] = {
    "activation_bits": 4,
    "activation_group_size": -1,
    "activation_symmetric": True,
    "activation_clip": 1.0,
    "kv_bits": 4,
    "kv_symmetric": True,
    "kv_clip": 1.0,
    "importance": "attncon",
    "importance_min": 0.005,
    "importance_max": 1.0,
    "importance_tokens": 0,
    "importance_chunks": "",
    "importance_power": 1,
    "importance_visible": "no",
    "importance_transform": "no",
    "importance_quantile": 0.0,
    "importance_skip": 0,
    "importance_mask": 0.0,
    "importance_truncate": 0.0,
    "importance_bins": 0,
    "importance_reverse": False,
    "importance_exact": False,
    "importance_linears": (),
    "propagate": 0.0,
    "propagate_overrides": (),
    "residual_correction": True,
    "residual_rotation": "hadamard-96",
    "value_rotation": "hadamard-16",
    "heads_rotation": "none",
    "mlp_rotation": "none",
    "source_sha256": "0" * 64,
    "method": "rsq",
    "bits": 3,
    "group_size": 64,
    "overrides": (),
    "symmetric": True,
    "signed_scales": True,
    "group_scales": "dynamic",
    "clip_exponent": 2.0,
    "clip_steps": 80,
    "act_order": False,
    "sweeps": 0,
    "refit": False,
    "damping": 0.01,
    "shrinkage": 1.0,
    "calibration": "file",
    "windows_sha256": "1" * 64,
    "samples": 5,
    "sequence_length": 63,
    "expand": 1,
    "seed": 0,
    "cache_type": "float32",
    "compute_type": "float32",
    "unit_sequences": 2,
    "hessian_panel": 128,
    "tile_columns": 64,
    "tile_rows": 137,
    "shard_bytes": 1_000_000,
    "grid": "integer",
    "tile_weights": 1234,
    "output_format": "compressed-tensors",
    "maths_version": 2,
    "device_kind": "x86",
}
"""A plan with a value for each field; other tests change what they are about."""

OTHER: dict[str, Any] = {
    "activation_bits": 8,
    "activation_group_size": 32,
    "activation_symmetric": False,
    "activation_clip": 0.9,
    "kv_bits": 16,
    "kv_symmetric": False,
    "kv_clip": 0.95,
    "importance": "uniform",
    "importance_min": 0.0,
    "importance_max": 2.0,
    "importance_tokens": 1,
    "importance_chunks": "0/2",
    "importance_power": 2,
    "importance_visible": "root",
    "importance_transform": "log",
    "importance_quantile": 0.1,
    "importance_skip": 1,
    "importance_mask": 0.1,
    "importance_truncate": 0.1,
    "importance_bins": 4,
    "importance_reverse": True,
    "importance_exact": True,
    "importance_linears": ("down_proj",),
    "propagate": 0.5,
    "propagate_overrides": ("x=0.5",),
    "residual_correction": False,
    "residual_rotation": "none",
    "value_rotation": "none",
    "heads_rotation": "hadamard-6",
    "mlp_rotation": "hadamard-172",
    "source_sha256": "2" * 64,
    "method": "gptq",
    "bits": 4,
    "group_size": -1,
    "overrides": ("lm_head=8",),
    "symmetric": False,
    "signed_scales": False,
    "group_scales": "static",
    "clip_exponent": 2.4,
    "clip_steps": 79,
    "act_order": True,
    "sweeps": 2,
    "refit": True,
    "damping": 0.1,
    "shrinkage": 0.0,
    "calibration": "c4",
    "windows_sha256": "3" * 64,
    "samples": 6,
    "sequence_length": 64,
    "expand": 2,
    "seed": 1,
    "cache_type": "bfloat16",
    "compute_type": "bfloat16",
    "unit_sequences": 3,
    "hessian_panel": 64,
    "tile_columns": 32,
    "tile_rows": 128,
    "shard_bytes": 1_000_001,
    "grid": "nf",
    "tile_weights": 0,
    "output_format": "gptq",
    "maths_version": 3,
    "device_kind": "arm",
}
FIELDS = [field.name for field in dataclasses.fields(QuantizationPlan)]


def plan(**changes: Any) -> QuantizationPlan:
    return QuantizationPlan(**(PLAN | changes))


def run_options(**changes: Any) -> RunOptions:
    return RunOptions(output=Path("out"), work_dir=Path("work"), **changes)


def test_tables_name_each_field():
    assert list(PLAN) == FIELDS
    assert list(OTHER) == FIELDS


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"method": "awq"},
        "--method must be one of rsq, quarot, gptq, rtn, rotate, not awq",
    ),
    ({"bits": 1}, "--bits must be 2 to 8, not 1"),
    ({"bits": 9}, "--bits must be 2 to 8, not 9"),
    ({"group_size": 63}, "--group-size must be 32, 64, 128, -1, not 63"),
    ({"group_size": 0}, "--group-size must be 32, 64, 128, -1, not 0"),
    (
        {"group_scales": "late"},
        "--group-scales must be dynamic or static, not late",
    ),
    ({"damping": 0.0}, "--damping must be above 0, at most 1, not 0.0"),
    ({"damping": 1.01}, "--damping must be above 0, at most 1, not 1.01"),
    ({"damping": float("nan")}, "--damping must be above 0, at most 1, not nan"),
    ({"samples": 0}, "--samples must be 1 or more, not 0"),
    ({"sequence_length": 1}, "--sequence-length must be 2 or more, not 1"),
    ({"expand": 0}, "--expand must be 1 to the sequence length (63), not 0"),
    ({"expand": 64}, "--expand must be 1 to the sequence length (63), not 64"),
]


def named(changes: dict[str, Any]) -> str:
    return "-".join(f"{name}-{value}" for name, value in changes.items())


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[named(changes) for changes, _ in REFUSED]
)
def test_plan_refuses(changes, message):
    with pytest.raises(UsageError) as caught:
        plan(**changes)
    assert str(caught.value) == message
    assert isinstance(caught.value, RsqError)
    assert isinstance(caught.value, ValueError)


BOUNDS: list[dict[str, Any]] = [
    *({"bits": bits} for bits in range(2, 9)),
    *({"group_size": size} for size in GROUP_SIZES),
    {"damping": 1.0},
    {"importance_min": 0.0},
    {"importance_min": 1.0},
    {"samples": 1},
    {"sequence_length": 2},
    {"expand": 63},
    {"importance": "first-n", "importance_tokens": 1},
    {"importance": "first-n", "importance_tokens": 63},
]


@pytest.mark.parametrize("changes", BOUNDS, ids=named)
def test_plan_takes_its_bounds(changes):
    made = plan(**changes)
    assert {name: getattr(made, name) for name in changes} == changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "--threads must be 1 to 1024, not 0"),
        ({"workers": 1025}, "--threads must be 1 to 1024, not 1025"),
        ({"units_in_flight": -1}, "--batch must be 0 (automatic) to 4096, not -1"),
        ({"units_in_flight": 4097}, "--batch must be 0 (automatic) to 4096, not 4097"),
    ],
    ids=lambda part: named(part) if isinstance(part, dict) else "",
)
def test_run_options_refuse(changes, message):
    with pytest.raises(UsageError) as caught:
        run_options(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("workers", [1, 1024])
@pytest.mark.parametrize("units", [0, 4096])
def test_run_options_take_their_bounds(workers, units):
    made = run_options(workers=workers, units_in_flight=units)
    assert (made.workers, made.units_in_flight) == (workers, units)


@pytest.mark.parametrize("made", [plan(), run_options()], ids=["plan", "options"])
def test_settings_are_frozen_and_closed(made):
    name = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, getattr(made, name))
    assert not hasattr(made, "__dict__")
    with pytest.raises(TypeError):
        type(made)("positional")


def test_canonical_json_is_one_sorted_line_and_comes_back():
    text = plan().canonical_json()
    assert "\n" not in text
    assert json.loads(text) == PLAN | {
        "overrides": [],
        "propagate_overrides": [],
        "importance_linears": [],
    }
    assert list(json.loads(text)) == sorted(FIELDS)
    assert QuantizationPlan.from_fields(json.loads(text)) == plan()
    # Neither the order of the arguments nor the way in changes it.
    backwards = QuantizationPlan(**dict(reversed(PLAN.items())))
    assert backwards.canonical_json() == text
    changed = dataclasses.replace(plan(bits=8), bits=3)
    assert changed.canonical_json() == text
    assert plan().sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_canonical_json_begins_as_it_always_did():
    """Another spelling would orphan every run that waits for its resume."""
    expected = '{"act_order": false, "activation_bits": 4, "activation_clip": 1.0, '
    assert plan().canonical_json().startswith(expected)
    assert '"bits": 3, "cache_type": "float32", ' in plan().canonical_json()
    assert '"damping": 0.01,' in plan().canonical_json()
    assert '"symmetric": true,' in plan().canonical_json()


@pytest.mark.parametrize("name", FIELDS)
def test_hash_changes_with_each_field(name):
    assert plan(**{name: OTHER[name]}).sha256 != plan().sha256


def test_hash_tells_neighbouring_floats_apart():
    assert plan(damping=0.1 + 0.2).sha256 != plan(damping=0.3).sha256


@pytest.mark.parametrize(
    ("samples", "expand", "unit", "units"),
    [(1, 1, 1, 1), (5, 1, 2, 3), (63, 8, 4, 126), (137, 1, 172, 1), (137, 3, 5, 83)],
)
def test_counts(samples, expand, unit, units):
    made = plan(samples=samples, expand=expand, unit_sequences=unit)
    assert made.sequences == samples * expand
    assert made.units == units


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_group_size_falls_back_to_the_row(group_size):
    made = plan(group_size=group_size)
    for inputs in (1, 32, 63, 96, 128, 137, 172, 4864):
        divides = group_size != -1 and inputs % group_size == 0
        scheme = Scheme(3, group_size if divides else -1, symmetric=True)
        assert made.scheme("model.layers.0.mlp.down_proj", inputs) == scheme


def test_damping_grows_with_the_inputs_per_token():
    made = plan(damping=0.01, shrinkage=1.0, samples=10, sequence_length=50, expand=5)
    assert made.damping_for(50) == pytest.approx(0.01 + 50 / 500)
    assert made.damping_for(10_000) == 1.0
    assert plan(damping=0.02, shrinkage=0.0).damping_for(10_000) == 0.02


def test_only_rounding_needs_no_calibration():
    needs = {name: plan(method=name).needs_calibration for name in ("rtn", "gptq")}
    assert needs == {"rtn": False, "gptq": True}
