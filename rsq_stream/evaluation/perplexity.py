"""Perplexity and KL divergence, streamed block by block.

Only one decoder block is in memory at a time; hidden states of all windows are
kept in memory up to a budget and on disk beyond it. Loss and divergence are computed
tile by tile of tokens and of the vocabulary: neither embedding nor head need be whole.
"""

import math
import tempfile
import time
from pathlib import Path
from threading import Event

import psutil
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rsq_stream.checkpoint.model_reader import ModelReader
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.checkpoint.source import chunk_rows
from rsq_stream.config.activations import ActivationRounding
from rsq_stream.errors import CalibrationError, UnsupportedModelError
from rsq_stream.evaluation.result import Evaluation
from rsq_stream.evaluation.token_losses import TokenLosses
from rsq_stream.events import Listener, ignore
from rsq_stream.model.architecture import read_architecture
from rsq_stream.model.block import Block
from rsq_stream.pipeline.activations.calibration_pass import CalibrationPasses
from rsq_stream.pipeline.activations.finite_check import require_finite
from rsq_stream.runtime.worker_pool import single_threaded_products
from rsq_stream.storage.activation_cache import Slot
from rsq_stream.storage.activation_shape import SlotShape
from rsq_stream.storage.direct_io import has_direct_io

_UNIT_TOKENS = 2048
_LOGIT_TOKENS = 256
"""Tokens whose logits are held at a time."""
_LONGEST = 2048
"""Default tokens of a window, where the model was made for as many."""
Tiles = list[tuple[int, list[Tensor]]]
"""Where in the vocabulary a tile begins, and those rows of each model's head."""


def window_length(checkpoint: Checkpoint, requested: int | None) -> int:
    """Return the tokens per window: as requested, else 2048 or the model's limit."""
    architecture = read_architecture(checkpoint.config, checkpoint.files.where)
    return requested or min(_LONGEST, architecture.longest)


def evaluation_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    bos: bool,
    max_windows: int | None,
    where: str,
) -> Int[Tensor, "B T"]:
    """Cut a text into windows that do not overlap; the rest is dropped.

    With ``bos`` each window begins with the tokenizer's BOS token.

    Raises
    ------
    CalibrationError
        The text is shorter than one window, or there is no BOS token.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    body = sequence_length - 1 if bos else sequence_length
    count = len(ids) // body
    if max_windows is not None:
        count = min(count, max_windows)
    if count < 1:
        raise CalibrationError(
            f"{where}: {len(ids)} tokens, but one window needs {body}; give more text"
            " or a smaller --sequence-length"
        )
    window_BT = torch.tensor(ids[: count * body]).view(count, body)
    if not bos:
        return window_BT
    if tokenizer.bos_token_id is None:
        raise CalibrationError("--bos: the tokenizer has no BOS token; use --no-bos")
    start_B1 = torch.full((count, 1), tokenizer.bos_token_id)
    return torch.cat([start_B1, window_BT], dim=1)


def evaluate(
    checkpoint: Checkpoint,
    window_BT: Int[Tensor, "B T"],
    *,
    against: Checkpoint | None = None,
    scheme: ActivationRounding | None = None,
    workers: int = 1,
    device: str = "cpu",
    listener: Listener = ignore,
) -> Evaluation:
    """Measure perplexity, and the divergence from another model if one is given.

    Activations are rounded as ``scheme`` has it, by default as the folder is served;
    those of ``against`` as its own folder is.

    Raises
    ------
    UnsupportedModelError
        The two models have different vocabularies, or a token is outside of it.
    """
    began = time.monotonic()
    place = torch.device(device)
    models = [ModelReader(checkpoint, place, scheme)]
    if against is not None:
        models.append(ModelReader(against, place))
    vocabularies = {model.architecture.vocabulary for model in models}
    if len(vocabularies) > 1 or int(window_BT.max()) >= min(vocabularies):
        raise UnsupportedModelError(
            f"{checkpoint.files.where}: vocabularies of {sorted(vocabularies)} and a"
            f" largest token of {int(window_BT.max())} do not go together"
        )
    with (
        tempfile.TemporaryDirectory(prefix="rsq-stream-eval-") as scratch,
        single_threaded_products(workers) as pool,
    ):
        passes = CalibrationPasses(
            pool=pool, in_flight=2 * workers, listener=listener, stop=Event()
        )
        slots = [
            _final_hidden(model, window_BT, Path(scratch) / str(number), passes)
            for number, model in enumerate(models)
        ]
        losses, divergence = _compare(models, slots, window_BT, passes)
        for slot in slots:
            slot.close()
    predicted = window_BT.shape[0] * (window_BT.shape[1] - 1)
    loss = losses[0] / predicted
    return Evaluation(
        perplexity=math.exp(loss),
        loss=loss,
        tokens=predicted,
        windows=window_BT.shape[0],
        seconds=time.monotonic() - began,
        kl_divergence=divergence / predicted if against is not None else None,
        against_perplexity=math.exp(losses[1] / predicted) if against else None,
    )


def _final_hidden(
    model: ModelReader, window_BT: Tensor, folder: Path, passes: CalibrationPasses
) -> Slot:
    """Run all windows through all blocks; the slot is overwritten block by block."""
    sequences, tokens = window_BT.shape
    shape = SlotShape(
        sequences=sequences,
        tokens=tokens,
        width=model.architecture.width,
        unit_sequences=max(1, _UNIT_TOKENS // tokens),
        dtype=model.compute_type,
    )
    free = int(psutil.virtual_memory().available * 0.25)
    resident = min(shape.units, free // shape.unit_bytes)
    folder.mkdir()
    direct = has_direct_io(folder)
    slot = Slot(folder / "x", shape, resident, passes.in_flight, direct=direct)
    for unit in range(shape.units):
        first = unit * shape.unit_sequences
        token_BT = window_BT[first : first + shape.unit_sequences]
        x_BTD = model.embedded(token_BT).to(shape.dtype)
        slot.write(unit, x_BTD, durable=False)
    slot.flush(durable=False)
    rope = model.rope(tokens)
    for index in range(model.architecture.blocks):
        block = model.block(index, rope)

        def one(unit: int, x_BTD: Tensor, block: Block = block) -> Tensor:
            del unit
            return block.forward(x_BTD.to(model.device))

        for run in passes.run([slot], index, "forward", one):
            for unit, x_BTD in run:
                require_finite(x_BTD, index, "forward", unit * shape.unit_sequences)
                slot.write(unit, x_BTD, durable=False)
        slot.flush(durable=False)
    return slot


def _compare(
    models: list[ModelReader],
    slots: list[Slot],
    window_BT: Tensor,
    passes: CalibrationPasses,
) -> tuple[list[float], float]:
    """Sum the loss of each model, and the divergence of the second from the first.

    The heads come in tiles of a fixed number of rows; as many as there is memory for
    share a pass over the windows. That decides no bit.
    """
    device, architecture = models[0].device, models[0].architecture
    gains = [model.final_norm().to(device) for model in models]
    count, units = slots[0].shape.unit_sequences, slots[0].shape.units
    targets = [
        window_BT[unit * count : (unit + 1) * count, 1:].reshape(-1).long().to(device)
        for unit in range(units)
    ]
    made = [TokenLosses(target_L, len(models)) for target_L in targets]
    rows = chunk_rows(max(model.architecture.width for model in models))
    free = int(psutil.virtual_memory().available * 0.25)
    tile_bytes = sum(4 * rows * model.architecture.width for model in models)
    firsts = range(0, architecture.vocabulary, rows)
    at_once = max(1, free // tile_bytes)
    for start in range(0, len(firsts), at_once):
        tiles = [
            (
                first,
                [model.head_rows(first, rows).to(device).float() for model in models],
            )
            for first in firsts[start : start + at_once]
        ]

        def one(item: tuple[int, list[Tensor]], tiles: Tiles = tiles) -> None:
            unit, found = item
            hidden = [
                model.normalised(x_BTD.to(device), gain_D)[:, :-1].flatten(0, 1)
                for model, gain_D, x_BTD in zip(models, gains, found, strict=True)
            ]
            for first, heads in tiles:
                for begin in range(0, len(targets[unit]), _LOGIT_TOKENS):
                    part = slice(begin, begin + _LOGIT_TOKENS)
                    pairs = zip(hidden, heads, strict=True)
                    logits = [x_LD[part] @ head_VD.T for x_LD, head_VD in pairs]
                    made[unit].take_in(part, first, logits)

        readers = [slot.read(range(units)) for slot in slots]
        for begin in range(0, units, passes.in_flight):
            run = range(begin, min(begin + passes.in_flight, units))
            items = [(unit, [next(reader) for reader in readers]) for unit in run]
            passes.pool.map(one, items)
    losses, divergence = [0.0] * len(models), 0.0
    for sums, apart in (unit.sums() for unit in made):
        losses = [old + new for old, new in zip(losses, sums, strict=True)]
        divergence += apart
    return losses, divergence
