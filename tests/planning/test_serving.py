"""What serving will take: sizes against the output itself, and who takes which bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rsq_stream.checkpoint.files import FolderFiles
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.settings import Settings
from rsq_stream.demo import MODEL
from rsq_stream.output.layout import plan_layouts
from rsq_stream.planning.quantization_plan import make_plan
from rsq_stream.planning.serving import Serving, serving
from rsq_stream.planning.validate import inspect_checkpoint
from tests.support.cli_runs import Run

TRANSFORMERS = "transformers with compressed-tensors 0.18 or newer"
HUMMING = "vLLM (its Humming kernel, sm_75 or newer)"


def found(vram_bytes: int | None = None, **given: Any) -> Serving:
    checkpoint = Checkpoint(FolderFiles(MODEL))
    architecture = inspect_checkpoint(checkpoint)
    settings = Settings(method="rtn", **given)
    plan = make_plan(
        checkpoint, architecture, settings, None, device=torch.device("cpu")
    )
    layouts = plan_layouts(checkpoint, architecture, plan)
    return serving(architecture, plan, layouts, vram_bytes)


@pytest.mark.parametrize(
    ("given", "runtimes"),
    [
        ({"bits": 4}, (TRANSFORMERS, "vLLM", "SGLang")),
        ({"bits": 3}, (TRANSFORMERS, HUMMING)),
        ({"bits": 4, "overrides": ("down_proj=8",)}, (TRANSFORMERS, "vLLM", "SGLang")),
        ({"bits": 4, "overrides": ("down_proj=5",)}, (TRANSFORMERS, HUMMING)),
        ({"bits": 8, "overrides": ("*_proj=16",)}, ("any that takes the source",)),
        (
            {"bits": 8, "symmetric": False, "signed_scales": False},
            (f"{TRANSFORMERS} (dequantize=True)", "vLLM", "SGLang"),
        ),
        ({"bits": 2, "grid": "nf"}, ("rsq_stream.load_model, and no other",)),
    ],
)
def test_who_takes_it(given: dict[str, Any], runtimes: tuple[str, ...]) -> None:
    assert found(**given).runtimes == runtimes


def test_room_for_a_kv_cache() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    per_token = 2 * 2 * width * kv_heads * config["num_hidden_layers"]
    alone = found()
    assert alone.kv_bytes_per_token == per_token
    assert alone.kv_tokens is None
    size = alone.resident_bytes
    assert found(size + 10 * per_token - 1).kv_tokens == 9
    assert found(size - 1).kv_tokens == 0


def test_the_size_is_that_of_the_output(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("--method", "rtn", "--bits", "3", "--output", output)
    code, out, _ = run("plan", MODEL, *arguments, "--json")
    assert code == 0
    planned = json.loads(out)["serving"]["resident_bytes"]
    code, out, err = run("quantize", MODEL, *arguments, "--device", "cpu")
    assert code == 0, err
    tensors = [load_file(path) for path in output.glob("*.safetensors")]
    assert planned == sum(t.nbytes for shard in tensors for t in shard.values())
    assert f"served size      {planned:,} bytes" in out
    assert f"runs in          {TRANSFORMERS}; {HUMMING}\n" in out
