"""``--preset rsq-paper``: its Hessians are those of the paper's code, as a formula.

H = (2 / N) sum over N sequences and their tokens j of w_j x_j x_j^T, with w = r / mean
r and r the attention received, mapped linearly onto [r_min, r_max] in each sequence; x
is what a linear reads in the quantized model, online rotations included.
"""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from rsq_stream.cli.options.presets import PRESETS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import factorise
from rsq_stream.calibration.text import read_text
from rsq_stream.calibration.tokenizer import load_tokenizer
from rsq_stream.calibration.windows import Windows, choose_windows
from rsq_stream.pipeline import block_solver
from rsq_stream.planning.validate import inspect_checkpoint
from tests.support import textbook
from tests.support.dense import textbook_rotations
from tests.support.toy import (
    calm,
    decoded_state,
    open_toy,
    plan_toy,
    run_toy,
    toy_checkpoint,
    toy_windows,
)

SAMPLES, LENGTH = 6, 96
SIZES: dict[str, Any] = {"samples": SAMPLES, "sequence_length": LENGTH}


def solved(
    source: Path, output: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], Any]:
    """Quantize by the preset; gives each stage's Hessian and the plan."""
    seen: list[Tensor] = []

    def recorded(hessian: Hessian, *arguments: Any) -> Any:
        seen.append(hessian.matrix_II.clone())
        return factorise(hessian, *arguments)

    monkeypatch.setattr(block_solver, "factorise", recorded)
    chosen = PRESETS["rsq-paper"] | SIZES
    run_toy(source, output, windows=windows, clip_steps=80, **chosen)
    plan, _ = plan_toy(source, windows=windows, clip_steps=80, **chosen)
    assert (plan.bits, plan.group_size) == (3, -1)
    return seen, plan


@torch.no_grad()
def formula(source: Path, output: Path, window_BT: Tensor, plan: Any) -> list[Tensor]:
    """Return each stage's Hessian in float64, from the finished model and the source.

    Nothing after a linear changes its inputs, so the finished model has what it read.
    """
    models = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
        architecture = inspect_checkpoint(open_toy(source))
        textbook.rotate(model, **textbook_rotations(plan, architecture))
        models.append(model)
    whole, model = models
    state = {name: tensor.double() for name, tensor in decoded_state(output).items()}
    model.load_state_dict(state)
    seen: dict[nn.Module, Tensor] = {}
    for module in chain(*(chain(*textbook.stages(b)) for b in model.model.layers)):
        module.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]}))
    outputs = model(window_BT, use_cache=False, output_hidden_states=True)
    position_1T = torch.arange(window_BT.shape[1])[None]
    found = []
    for index, block in enumerate(model.model.layers):
        hidden_BTD = outputs.hidden_states[index]
        call = {"position_embeddings": model.model.rotary_emb(hidden_BTD, position_1T)}
        unquantized = whole.model.layers[index]
        score_BT = textbook.received_attention(unquantized, hidden_BTD, call)
        low_B1, high_B1 = score_BT.amin(1, keepdim=True), score_BT.amax(1, keepdim=True)
        r_BT = 0.005 + (1 - 0.005) * (score_BT - low_B1) / (high_B1 - low_B1)
        w_BT = r_BT / r_BT.mean(1, keepdim=True)
        for linears in textbook.stages(block):
            x_BTI = seen[linears[0]]
            sum_II = torch.einsum("bt,bti,btj->ij", w_BT, x_BTI, x_BTI)
            found.append(2 / len(window_BT) * sum_II)
    return found


def distances(
    source: Path, output: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    """How far each Hessian is from the formula's, as a share of it."""
    with calm():
        ours, plan = solved(source, output, windows, monkeypatch)
        expected = formula(source, output, windows.window_BT.long(), plan)
    assert len(ours) == len(expected) == 8
    return [
        float((2 / SAMPLES * h.double() - e).triu().norm() / e.triu().norm())
        for h, e in zip(ours, expected, strict=True)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_on_a_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    source = toy_checkpoint(tmp_path / "toy", family=family)
    windows = toy_windows(128, SAMPLES, LENGTH, 1)
    found = distances(source, tmp_path / "out", windows, monkeypatch)
    assert max(found) < 1e-5


def test_on_a_trained_model(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shared / "models" / "tinystories-656K"
    text = read_text(str(shared / "data/tinystories/validation.jsonl"), 0)[:100_000]
    tokenizer = load_tokenizer(source)
    window_BT = choose_windows(
        text, tokenizer, samples=SAMPLES, sequence_length=LENGTH, seed=0, where="text"
    )
    found = distances(source, tmp_path / "out", Windows(window_BT, 1), monkeypatch)
    assert max(found) < 1e-5


def test_rounded_weights_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS["rsq-paper"], "importance_exact", False)
    source = toy_checkpoint(tmp_path / "toy")
    windows = toy_windows(128, SAMPLES, LENGTH, 1)
    found = distances(source, tmp_path / "out", windows, monkeypatch)
    assert min(found) > 1e-4
