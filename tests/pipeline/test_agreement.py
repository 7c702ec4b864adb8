"""The streamed tool against the textbook: one model, same windows, same grid.

The textbook holds the whole model in float64, inverts Hessians and materialises
attention; perplexities on a trained model must agree within 0.5 %.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rsq_stream.cli.options.presets import PRESETS
from transformers import AutoModelForCausalLM

from rsq_stream.calibration.text import read_text
from rsq_stream.calibration.tokenizer import load_tokenizer
from rsq_stream.calibration.windows import Windows, choose_windows
from rsq_stream.checkpoint.files import open_files
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.run_options import RunOptions
from rsq_stream.config.settings import Settings
from rsq_stream.evaluation.perplexity import evaluate, evaluation_windows
from rsq_stream.pipeline.quantize import quantize
from rsq_stream.planning.execution_plan import plan_execution
from rsq_stream.planning.quantization_plan import make_plan
from rsq_stream.planning.validate import inspect_checkpoint
from tests.support import textbook
from tests.support.dense import textbook_rotations
from tests.support.toy import job_of

SAMPLES, LENGTH = 24, 256
SIZES = {"samples": SAMPLES, "sequence_length": LENGTH}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products lose more to OpenMP's barriers than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("bits", "group_size"), [(3, -1), (2, 32)])
@pytest.mark.parametrize(
    ("method", "propagate"),
    [("gptq", 0.0), ("quarot", 0.0), ("rsq", 0.0), ("rsq", 0.5)],
)
def test_perplexity_agrees_with_the_textbook(
    shared: Path,
    tmp_path: Path,
    method: str,
    propagate: float,
    bits: int,
    group_size: int,
) -> None:
    chosen: dict[str, Any] = {"method": method, "propagate": propagate}
    chosen |= {"bits": bits, "group_size": group_size, "sweeps": 0, "refit": False}
    chosen["shrinkage"] = 0.0
    ours, theirs = perplexities(shared, tmp_path, Settings(**chosen | SIZES))
    assert ours == pytest.approx(theirs, rel=0.005)


def test_the_papers_preset_agrees_with_the_textbook(
    shared: Path, tmp_path: Path
) -> None:
    known = {field.name for field in dataclasses.fields(Settings)}
    assert PRESETS["rsq-paper"].keys() <= known
    settings = Settings(**PRESETS["rsq-paper"] | SIZES)
    ours, theirs = perplexities(shared, tmp_path, settings)
    assert ours == pytest.approx(theirs, rel=0.005)


def perplexities(
    shared: Path, tmp_path: Path, settings: Settings
) -> tuple[float, float]:
    """Return the perplexity of what we make, and of what the textbook makes."""
    folder = shared / "models" / "tinystories-656K"
    text = read_text(str(shared / "data/tinystories/validation.jsonl"), 0)
    tokenizer = load_tokenizer(folder)
    window_BT = choose_windows(
        text, tokenizer, samples=SAMPLES, sequence_length=LENGTH, seed=0, where="text"
    )
    judged_BT = evaluation_windows(
        text, tokenizer, LENGTH, bos=False, max_windows=40, where="text"
    )
    checkpoint = Checkpoint(open_files(str(folder)))
    architecture = inspect_checkpoint(checkpoint)
    windows = Windows(window_BT, 1)
    plan = make_plan(
        checkpoint, architecture, settings, windows, device=torch.device("cpu")
    )
    options = RunOptions(output=tmp_path / "out", work_dir=tmp_path / "work")
    execution = plan_execution(checkpoint, architecture, plan, options)
    parts = {"plan": plan, "execution": execution, "options": options}
    quantize(job_of(checkpoint, **parts, windows=windows))
    ours = evaluate(Checkpoint(open_files(str(tmp_path / "out"))), judged_BT)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rotations: dict[str, Any] = {**textbook_rotations(plan, architecture)}
    textbook.quantize_model(
        model,
        window_BT,
        method=settings.method,
        bits=settings.usual_bits,
        group_size=settings.group_size,
        **rotations,
        importance_min=plan.importance_min,
        exact=plan.importance_exact,
        propagate=plan.propagate,
        signed=plan.signed_scales,
        exponent=plan.clip_exponent,
    )
    return ours.perplexity, textbook.perplexity(model, judged_BT)
