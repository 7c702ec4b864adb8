"""A greedy continuation of a prompt, with the model read block by block.

Every new token is a pass over all blocks; blocks stay in memory where all of
them fit into a quarter of what is free, and are read again otherwise.
"""

from math import prod

import psutil
import torch

from rsq_stream.activation_fields import ActivationScheme
from rsq_stream.calibration import load_tokenizer
from rsq_stream.evaluation.reader import ModelReader
from rsq_stream.model.block import Block
from rsq_stream.ops.pool import single_threaded_products
from rsq_stream.storage.shards import Checkpoint


def greedy_sample(
    checkpoint: Checkpoint,
    prompt: str,
    tokens: int,
    *,
    scheme: ActivationScheme | None = None,
    device: str = "cpu",
) -> str:
    """Continue ``prompt`` by the likeliest token, ``tokens`` times; gives it all.

    Activations are rounded as ``scheme`` has it, by default as the folder is served.
    """
    # One short sequence: threads would wait for each other longer than they work.
    with single_threaded_products(1):
        model = ModelReader(checkpoint, torch.device(device), scheme)
        return _continued(model, checkpoint, prompt, tokens)


def _continued(
    model: ModelReader, checkpoint: Checkpoint, prompt: str, tokens: int
) -> str:
    place = model.device
    folder = checkpoint.files.path("tokenizer_config.json").parent
    tokenizer = load_tokenizer(folder)
    ids: list[int] = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id or 0]
    architecture = model.architecture
    rope = model.rope(len(ids) + tokens)
    block_bytes = 4 * sum(prod(shape) for shape in architecture.block_shapes().values())
    fits = architecture.blocks * block_bytes < psutil.virtual_memory().available // 4
    kept: dict[int, Block] = {}
    gain_D = model.final_norm().to(place)
    head_VD = model.head().to(place).float()
    for _ in range(tokens):
        x_BTD = model.embedded(torch.tensor([ids])).to(place, model.compute_type)
        for index in range(architecture.blocks):
            block = kept.get(index) or model.block(index, rope)
            if fits:
                kept[index] = block
            x_BTD = block.forward(x_BTD)
        last_D = model.normalised(x_BTD[:, -1], gain_D)[0]
        ids.append(int((head_VD @ last_D).argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids, skip_special_tokens=True))
