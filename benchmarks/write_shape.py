"""Write a model of true shape, few blocks and random weights, and a text for it.

    python benchmarks/write_shape.py FOLDER [--shape 8B] [--blocks 1] [--words 10000]

Makes FOLDER/model and FOLDER/text.txt. ``8B``, ``70B`` and ``405B`` are Llama-3's
shapes; ``narrow`` and ``4M`` are small ones, for runs with many tokens or blocks.
"""

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rsq_stream.model.architecture import read_architecture
from rsq_stream.model.tensor_names import block_prefix

SHAPES = {
    "8B": (4096, 14336, 32, 8, 128256),
    "70B": (8192, 28672, 64, 8, 128256),
    "405B": (16384, 53248, 128, 8, 128256),
    "narrow": (256, 768, 4, 4, 4096),
    "4M": (512, 2048, 8, 8, 4096),
}
"""Width, MLP width, heads, KV heads, vocabulary (of the first three, the models')."""
_WORDS = 512
_PART = 1 << 24


def write_model(folder: Path, shape: str, blocks: int) -> None:
    """Write config, tokenizer and one shard, tensor by tensor."""
    width, mlp, heads, kv_heads, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{n}": n for n in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    architecture = read_architecture(config, "here")
    sizes = dict(architecture.outer_shapes())
    for block in range(blocks):
        for name, size in architecture.block_shapes(block).items():
            sizes[block_prefix(block) + name] = size
    header: dict[str, Any] = {}
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    seeds = count()
    workers = len(os.sched_getaffinity(0))
    with (
        (folder / "model.safetensors").open("wb") as file,
        ThreadPoolExecutor(workers) as pool,
    ):
        content = json.dumps(header).encode()
        file.write(len(content).to_bytes(8, "little") + content)
        for size in sizes.values():
            parts = [(next(seeds), *part) for part in parts_of(size)]
            for first in range(0, len(parts), workers):  # so many are in memory
                for part in pool.map(random_part, parts[first : first + workers]):
                    file.write(part.view(torch.uint8).numpy().data)


def parts_of(size: tuple[int, ...]) -> Iterator[tuple[int, float, float]]:
    """Return number, deviation and mean of the values of a tensor, by parts."""
    values = prod(size)
    of = (0.0, 1.0) if len(size) == 1 else (size[-1] ** -0.5, 0.0)
    for start in range(0, values, _PART):
        yield min(_PART, values - start), *of


def random_part(drawn: tuple[int, int, float, float]) -> torch.Tensor:
    """Draw a part with a seed of its own, so that workers change nothing."""
    seed, values, deviation, mean = drawn
    made = torch.randn(values, generator=torch.Generator().manual_seed(seed))
    return made.mul_(deviation).add_(mean).bfloat16()


def write_text(path: Path, words: int) -> None:
    """Write random words of the tokenizer."""
    random = torch.Generator().manual_seed(0)
    picked = torch.randint(1, _WORDS, (words,), generator=random).tolist()
    path.write_text(" ".join(f"w{n}" for n in picked))


def main() -> None:
    """Read the command line, write both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--words", type=int, default=10_000)
    given = parser.parse_args()
    write_model(given.folder / "model", given.shape, given.blocks)
    write_text(given.folder / "text.txt", given.words)


if __name__ == "__main__":
    main()
