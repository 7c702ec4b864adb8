"""What runs in a peer's own environment: quantize, measure, save.

    python benchmarks/peer_workers.py JOB

Started by ``peers.py``. JOB is JSON: the peer, its settings, the model, bits, group
size, and the folder with the windows, where the result goes. Nothing of rsq-stream is
imported here.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ``lap`` notes the seconds of the stage that has ended.

Job = dict[str, Any]
Lap = Callable[[str], None]


def plain_model(folder: str) -> Any:
    """Load a model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def llm_compressor(job: Job, window_BT: Any, lap: Lap) -> Any:
    """Quantize by GPTQModifier, after SpinQuantModifier where rotations are given."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from torch.utils.data import DataLoader

    model = plain_model(job["model"])
    lap("load")
    settings = dict(job["settings"])
    rotations = settings.pop("rotations", None)
    size = {"num_bits": job["bits"], "group_size": job["group_size"]}
    weights = QuantizationArgs(strategy="group", **size, **settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = [GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])]
    if rotations:  # R1 and R2 are folded into the weights: nothing stays online
        recipe.insert(0, SpinQuantModifier(rotations=rotations))
    rows = [{"input_ids": row_T, "attention_mask": row_T**0} for row_T in window_BT]
    text = {"num_calibration_samples": len(rows), "max_seq_length": window_BT.shape[1]}
    oneshot(model=model, recipe=recipe, dataset=DataLoader(rows), **text)
    lap("quantize")
    return model


def gptqmodel(job: Job, window_BT: Any, lap: Lap) -> Any:
    """Quantize by GPTQModel; its packed linears become plain ones again."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    size = {"bits": job["bits"], "group_size": job["group_size"]}
    # v2 has the zero points as they are, v1 less one: the packed linears read v2.
    stay = {"format": "gptq_v2", "offload_to_disk": False}
    config = QuantizeConfig(**size, **stay, **job["settings"])
    model = GPTQModel.load(job["model"], config, dtype=torch.float32, device="cpu")
    lap("load")
    model.quantize([{"input_ids": row_T.tolist()} for row_T in window_BT])
    lap("quantize")
    for name, packed in list(model.model.named_modules()):
        if hasattr(packed, "dequantize_weight"):
            weight_OI = packed.eval().dequantize_weight().T.float().clone()
            linear = torch.nn.Linear(*weight_OI.shape[::-1], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
            model.model.set_submodule(name, linear)
    return model.model


def auto_round(job: Job, window_BT: Any, lap: Lap) -> Any:
    """Tune the rounding by signed gradients; the weights end up on the grid."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model = plain_model(job["model"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lap("load")
    size = {"bits": job["bits"], "group_size": job["group_size"]}
    text = {"nsamples": len(window_BT), "seqlen": window_BT.shape[1]}
    how = {"iters": 200, "device_map": "cpu", "amp": False, **job["settings"]}
    batches = list(window_BT.split(8))
    tuner = AutoRound(model, tokenizer, dataset=batches, **size, **text, **how)
    model, _ = tuner.quantize()
    lap("quantize")
    return model


WORKERS = {
    "plain": lambda job, window_BT, lap: plain_model(job["model"]),
    "llm-compressor": llm_compressor,
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
}


def main() -> None:
    """Quantize in this process, measure, leave the figures in a file."""
    from safetensors.torch import load_file

    job: Job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    seconds, last = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = now - last, now

    windows = load_file(folder / "windows")
    lap("import")
    model = WORKERS[job["peer"]](job, windows["calibration"], lap)
    lap("convert")
    perplexity = loop_perplexity(model.eval(), windows["evaluation"])
    lap("evaluate")
    if job["peer"] == "llm-compressor":  # its oneshot has taught the model to
        model.save_pretrained(folder / "saved", save_compressed=True)
        lap("save")
    result = folder / "result.json"
    result.write_text(json.dumps({"perplexity": perplexity} | seconds))


def loop_perplexity(model: Any, window_BT: Any) -> float:
    """Return exp of the mean fp32 loss of tokens 2 .. T of each window."""
    import torch

    loss = 0.0
    with torch.inference_mode():
        for part_BT in window_BT.split(4):
            logits = model(input_ids=part_BT, use_cache=False).logits[:, :-1].float()
            loss += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part_BT[:, 1:].flatten(), reduction="sum"
            ).item()
    return math.exp(loss / window_BT[:, 1:].numel())


if __name__ == "__main__":
    main()
