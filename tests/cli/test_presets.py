"""``--preset``: what it sets, and that what is given beside it wins."""

import json
from pathlib import Path

import pytest
from rsq_stream.cli.options.presets import PRESETS, with_preset

from rsq_stream.demo import MODEL
from rsq_stream.errors import UsageError
from tests.support.cli_runs import Run


def made(run: Run, *options: str) -> dict[str, object]:
    code, out, err = run("plan", MODEL, "--json", *options)
    assert (code, err) == (0, "")
    plan: dict[str, object] = json.loads(out)["plan"]
    return plan


def test_the_papers_choices(run: Run, tmp_path: Path) -> None:
    found = made(run, "--preset", "rsq-paper", "--output", str(tmp_path / "out"))
    wanted = {**PRESETS["rsq-paper"], "clip_steps": 80, "importance_power": 1}
    assert wanted.pop("rotation") == "full"
    assert {name: found[name] for name in wanted} == wanted
    assert found["residual_rotation"] == "hadamard-256"
    assert found["heads_rotation"] == "hadamard-8"
    assert found["mlp_rotation"] == "hadamard-512"
    assert found["tile_columns"] == 128


def test_what_is_given_wins_even_a_default(run: Run, tmp_path: Path) -> None:
    """2.0 is the default of --clip-exponent, and the preset has another."""
    given = ("--clip-exponent", "2.0", "--bits", "2", "--importance", "tokensim")
    found = made(run, *given, "--preset", "rsq-paper", "--output", str(tmp_path / "o"))
    assert found["clip_exponent"] == 2.0
    assert found["bits"] == 2
    assert found["importance"] == "tokensim"
    assert found["importance_min"] == 0.005


def test_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match="--preset must be one of rsq-paper, not rsq"):
        with_preset({"preset": "rsq"}, lambda name: False)


def test_bpw_beside_it_leaves_the_bits_open() -> None:
    given = {"preset": "rsq-paper", "bits": None, "bpw": 2.5}
    found = with_preset(given, lambda name: name == "bpw")
    assert found["bits"] is None
    assert found["clip_exponent"] == 2.4
