"""Real, small, trained models: quantized folders open in transformers as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rsq_stream.calibration.text import read_text
from rsq_stream.calibration.tokenizer import load_tokenizer
from rsq_stream.calibration.windows import Windows, choose_windows
from rsq_stream.evaluation.perplexity import evaluate, evaluation_windows
from tests.support.toy import decoded_state, open_toy, run_toy


@pytest.mark.parametrize("method", ["gptq", "rsq"])
@pytest.mark.parametrize(("bits", "group_size"), [(3, -1), (2, 32)])
@pytest.mark.parametrize("name", ["stories260K", "tinystories-656K"])
def test_transformers_gives_the_logits_of_our_decoded_weights(
    shared: Path, tmp_path: Path, name: str, bits: int, group_size: int, method: str
) -> None:
    folder, output = shared / "models" / name, tmp_path / "out"
    text = read_text(str(shared / "data/tinystories/validation.jsonl"), 0)[:100_000]
    window_BT = choose_windows(
        text,
        load_tokenizer(folder),
        samples=8,
        sequence_length=128,
        seed=0,
        where="text",
    )
    run_toy(
        folder,
        output,
        windows=Windows(window_BT, 1),
        method=method,
        bits=bits,
        group_size=group_size,
        samples=8,
        sequence_length=128,
    )
    opened = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert opened.config.tie_word_embeddings == (method == "gptq")
    config = AutoConfig.from_pretrained(output)
    del config.quantization_config
    ours = AutoModelForCausalLM.from_config(config).float()
    ours.load_state_dict(decoded_state(output), strict=False)
    ours.tie_weights()
    with torch.no_grad():
        apart_BTV = opened(window_BT[:2]).logits - ours(window_BT[:2]).logits
    assert apart_BTV.abs().max() <= 1e-4


@pytest.mark.parametrize("samples", [1, 4, 32])
def test_the_defaults_are_no_worse_however_few_the_tokens(
    shared: Path, tmp_path: Path, samples: int
) -> None:
    """128 tokens are as many as the narrowest linear has inputs, a third of down's."""
    folder = shared / "models" / "tinystories-656K"
    text = read_text(str(shared / "data/tinystories/validation.jsonl"), 0)
    tokenizer = load_tokenizer(folder)
    window_BT = choose_windows(
        text, tokenizer, samples=samples, sequence_length=128, seed=0, where="text"
    )
    how: dict[str, Any] = {"bos": True, "max_windows": 40, "where": "text"}
    judged_BT = evaluation_windows(text, tokenizer, 128, **how)
    ours: dict[str, Any] = dict.fromkeys(("propagate", "sweeps", "refit", "shrinkage"))
    found = []
    for name, settings in {"plain": {}, "default": ours}.items():
        sizes: dict[str, Any] = {"bits": 2, "clip_steps": 80, "samples": samples}
        run_toy(
            folder,
            tmp_path / name,
            windows=Windows(window_BT, 1),
            sequence_length=128,
            **sizes | settings,
        )
        found.append(evaluate(open_toy(tmp_path / name), judged_BT).perplexity)
    plain, default = found
    assert default < plain
