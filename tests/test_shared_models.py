"""Real, small, trained models: quantized folders open in transformers as they are."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rsq_stream.calibration import Windows, choose_windows, load_tokenizer, read_text
from tests.toy import decoded_state, run_toy


@pytest.mark.parametrize("method", ["gptq", "rsq"])
@pytest.mark.parametrize(("bits", "group_size"), [(3, -1), (2, 32)])
@pytest.mark.parametrize("name", ["stories260K", "tinystories-656K"])
def test_transformers_gives_the_logits_of_our_decoded_weights(
    shared: Path, tmp_path: Path, name: str, bits: int, group_size: int, method: str
) -> None:
    folder, output = shared / "models" / name, tmp_path / "out"
    text = read_text(str(shared / "data/tinystories/validation.jsonl"), 0)[:100_000]
    window_BT = choose_windows(text, load_tokenizer(folder), 8, 128, 0, "text")
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
