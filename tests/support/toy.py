"""A random tiny checkpoint of each family, and one call that quantizes it."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from rsq_stream.calibration.windows import Windows
from rsq_stream.checkpoint.files import FolderFiles
from rsq_stream.checkpoint.formats._quantization_config import format_of, schemes_of
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.execution_plan import ExecutionPlan
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.run_options import RunOptions
from rsq_stream.config.settings import Settings
from rsq_stream.events import Event, Listener, ignore
from rsq_stream.model.architecture import read_architecture
from rsq_stream.model.families import FAMILIES
from rsq_stream.model.families.base import GATED_DENSE
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.pipeline.job import Job, RunSummary
from rsq_stream.pipeline.quantize import quantize
from rsq_stream.planning.execution_plan import plan_execution
from rsq_stream.planning.quantization_plan import make_plan
from rsq_stream.planning.validate import inspect_checkpoint

STAGES = GATED_DENSE
"""The stages of every block of a toy."""
LINEARS = tuple(linear.name for stage in STAGES for linear in stage.linears)
"""The linears of every block of a toy, by their names in it."""
SMALL_PLAN: dict[str, Any] = {
    "unit_sequences": 2,
    "hessian_panel": 32,
    "tile_columns": 32,
    "tile_rows": 48,
    "shard_bytes": 100_000,
}
"""Fields of the plan that make a toy have several units, panels, tiles, shards."""
SMALL_SETTINGS: dict[str, Any] = {
    "bits": 3,
    "group_size": 32,
    "clip_steps": 10,
    "samples": 5,
    "sequence_length": 24,
    "calibration": "toy",
    # One stream, one pass: what goes beyond has tests of its own.
    "propagate": 0.0,
    "sweeps": 0,
    "refit": False,
    "shrinkage": 0.0,
}


def toy_checkpoint(
    folder: Path,
    *,
    family: str = "llama",
    width: int = 96,
    heads: int = 6,
    kv_heads: int = 2,
    mlp: int = 172,
    blocks: int = 2,
    vocabulary: int = 128,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    shards: int = 2,
    seed: int = 0,
    straddle: bool = True,
    **config: Any,
) -> Path:
    """Write a random model whose last block straddles two shards.

    Gains, biases and weights are all random, at sizes that keep the activations
    near 1 and the logits a few units apart.
    """
    stem = FAMILIES[family].class_prefix
    made = getattr(transformers, f"{stem}Config")(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=config.pop("head_dim", width // heads),
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        max_position_embeddings=config.pop("max_position_embeddings", 256),
        tie_word_embeddings=tied,
        **config,
    )
    model = getattr(transformers, f"{stem}ForCausalLM")(made)
    generator = torch.Generator().manual_seed(seed)
    total_bytes = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise))
            total_bytes += parameter.numel() * dtype.itemsize
    # The last shard is 0.6 of the others: its start lies inside the last block.
    largest = int(total_bytes / (shards - 0.4)) if shards > 1 else 2 * total_bytes
    model.to(dtype).save_pretrained(folder, max_shard_size=largest)
    if straddle:
        _check_shards(folder, shards, block_prefix(blocks - 1))
    return folder


def _scaled(name: str, noise: Tensor) -> Tensor:
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.2 * noise
    if "embed" in name or "lm_head" in name:
        return 0.25 * noise
    scaled: Tensor = noise / noise.shape[1] ** 0.5
    return scaled


def _check_shards(folder: Path, shards: int, block: str) -> None:
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == shards
    if shards > 1:
        for file in files[-2:]:
            with safe_open(file, "pt") as opened:
                assert any(name.startswith(block) for name in opened.keys())  # noqa: SIM118


def toy_windows(vocabulary: int, samples: int, length: int, seed: int) -> Windows:
    """Return random tokens as calibration windows, not expanded."""
    generator = torch.Generator().manual_seed(seed)
    size = (samples, length)
    return Windows(torch.randint(0, vocabulary, size, generator=generator).int(), 1)


def toy_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are ASCII characters; kept in a folder if asked.

    BOS is 2 and comes first where special tokens are asked for; EOS is 3.
    """
    vocabulary = {chr(code): code for code in range(128)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(
        single="\x02 $A", special_tokens=[("\x02", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="\x02", eos_token="\x03"
    )
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def open_toy(folder: Path) -> Checkpoint:
    """Open a folder as a checkpoint."""
    return Checkpoint(FolderFiles(folder))


def plan_toy(
    folder: Path,
    *,
    windows: Windows | None = None,
    plan: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[QuantizationPlan, Windows | None]:
    """Return the plan of a toy run and its windows; ``rtn`` gets none."""
    checkpoint = open_toy(folder)
    chosen = Settings(**SMALL_SETTINGS | settings)
    if windows is None and chosen.method != "rtn":
        length = chosen.sequence_length or 24
        vocabulary = checkpoint.config["vocab_size"]
        once = toy_windows(vocabulary, chosen.samples, length, chosen.seed)
        windows = dataclasses.replace(once, expand=chosen.expand)
    made = make_plan(
        checkpoint,
        inspect_checkpoint(checkpoint),
        chosen,
        windows,
        device=torch.device("cpu"),
    )
    return dataclasses.replace(made, **SMALL_PLAN | dict(plan or {})), windows


def run_toy(
    folder: Path,
    output: Path,
    *,
    windows: Windows | None = None,
    plan: Mapping[str, Any] | None = None,
    execution: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    listener: Listener = ignore,
    stop: threading.Event | None = None,
    **settings: Any,
) -> RunSummary:
    """Quantize a toy, 5 random windows of 24 tokens to 3 bits unless told otherwise.

    ``settings`` are fields of ``Settings``; ``plan``, ``execution`` and ``options``
    replace fields of what the planner made of them.
    """
    wanted, windows = plan_toy(folder, windows=windows, plan=plan, **settings)
    chosen = options_for(output, **dict(options or {}))
    made = execution_for(folder, wanted, chosen, **dict(execution or {}))
    job = job_of(
        open_toy(folder), plan=wanted, execution=made, options=chosen, windows=windows
    )
    return quantize(job, listener=listener, stop=stop)


def job_of(checkpoint: Checkpoint, **parts: Any) -> Job:
    """Put a job together from plan, execution, options and windows."""
    return Job(
        checkpoint=checkpoint, architecture=inspect_checkpoint(checkpoint), **parts
    )


def options_for(output: Path, **fields: Any) -> RunOptions:
    """Return run options with the work folder beside the output."""
    work_dir = output.with_name(output.name + ".work")
    return RunOptions(**{"output": output, "work_dir": work_dir} | fields)


def execution_for(
    folder: Path, plan: QuantizationPlan, options: RunOptions, **fields: Any
) -> ExecutionPlan:
    """Return the planner's execution plan, some fields replaced."""
    checkpoint = open_toy(folder)
    architecture = inspect_checkpoint(checkpoint)
    made = plan_execution(checkpoint, architecture, plan, options)
    return dataclasses.replace(made, **fields)


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Return the bytes of a folder's files by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob(pattern))}


def decoded_state(output: Path) -> dict[str, Tensor]:
    """Return an output's tensors by the names of the model, linears decoded."""
    checkpoint = open_toy(output)
    architecture = read_architecture(checkpoint.config, str(output))
    schemes = schemes_of(checkpoint.config, architecture, str(output))
    stored = format_of(checkpoint.config, str(output))
    assert schemes is not None
    assert stored is not None
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    state = {
        f"{name}.weight": stored.decode(checkpoint.read, name, scheme)
        for name, scheme in quantized.items()
    }
    for name in checkpoint.tensors:
        stem, _, kind = name.rpartition(".")
        if stem not in quantized or kind == "bias":
            state[name] = checkpoint.read(name)
    return state


@contextmanager
def calm() -> Iterator[None]:
    """Run torch on one thread, and transformers without progress bars.

    Products of a toy are so small that two threads only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        torch.set_num_threads(threads)


class Recorder:
    """A listener that keeps what it hears and may raise at the n-th event."""

    def __init__(self, fail_at: int = -1, error: BaseException | None = None) -> None:
        self.events: list[Event] = []
        self._fail_at = fail_at
        self._error = error or KeyboardInterrupt()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if len(self.events) - 1 == self._fail_at:
            raise self._error


def quick_folder() -> Path | None:
    """Return a folder in memory, where there is one: a sync costs nothing there."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 32
    return memory if roomy else None


def linear_names(blocks: int) -> list[str]:
    """Return the full names of all linears of the blocks."""
    return [block_prefix(b) + name for b in range(blocks) for name in LINEARS]


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_bytes())
