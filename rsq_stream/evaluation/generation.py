"""A greedy continuation of a prompt, with the model read block by block.

Every new token is a pass over all blocks and over the head, tile by tile of the
vocabulary. Either stays in memory where all of it fits into a quarter of what is free,
and is read again otherwise; that decides no logit.
"""

from collections.abc import Iterator

import psutil
import torch
from torch import Tensor

from rsq_stream.calibration.tokenizer import load_tokenizer
from rsq_stream.checkpoint.model_reader import ModelReader
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.checkpoint.source import chunk_rows
from rsq_stream.config.activations import ActivationRounding
from rsq_stream.model.block import Block
from rsq_stream.model.tensor_names import EMBEDDING
from rsq_stream.runtime.worker_pool import single_threaded_products


def greedy_sample(
    checkpoint: Checkpoint,
    prompt: str,
    tokens: int,
    *,
    scheme: ActivationRounding | None = None,
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
    left = psutil.virtual_memory().available // 4
    head = _Head(model, left)
    left -= head.kept_bytes
    fits = 4 * sum(map(architecture.block_entries, range(architecture.blocks))) < left
    kept: dict[int, Block] = {}
    gain_D = model.final_norm().to(place)
    for _ in range(tokens):
        x_BTD = model.embedded(torch.tensor([ids])).to(place, model.compute_type)
        for index in range(architecture.blocks):
            block = kept.get(index) or model.block(index, rope)
            if fits:
                kept[index] = block
            x_BTD = block.forward(x_BTD)
        last_D = model.normalised(x_BTD[:, -1], gain_D)[0]
        ids.append(head.likeliest(last_D))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids, skip_special_tokens=True))


class _Head:
    """The head in tiles of rows; they stay in memory if ``room_bytes`` take all."""

    def __init__(self, model: ModelReader, room_bytes: int) -> None:
        self._model = model
        self._vocabulary, width = model.architecture.outer_shapes()[EMBEDDING]
        self._rows = chunk_rows(width)
        whole = 4 * self._vocabulary * width
        self.kept_bytes = whole if whole < room_bytes else 0
        self._kept: list[Tensor] = []

    def likeliest(self, hidden_D: Tensor) -> int:
        """Return the token with the highest logit, of equal ones the first."""
        best, token = float("-inf"), 0
        for number, tile_RD in enumerate(self._tiles()):
            logit_R = tile_RD @ hidden_D
            row = int(logit_R.argmax())
            if float(logit_R[row]) > best:
                best, token = float(logit_R[row]), number * self._rows + row
        return token

    def _tiles(self) -> Iterator[Tensor]:
        if self._kept:
            yield from self._kept
            return
        for first in range(0, self._vocabulary, self._rows):
            rows_RD = self._model.head_rows(first, self._rows)
            tile_RD = rows_RD.to(self._model.device).float()
            if self.kept_bytes:
                self._kept.append(tile_RD)
            yield tile_RD
