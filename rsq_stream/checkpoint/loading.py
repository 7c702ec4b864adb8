"""An output as a model of transformers, with what a full rotation leaves to be done.

The whole model in memory, linears decoded: for use in Python. It reads safetensors and
config.json alone, and runs no code of the folder.
"""

from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from rsq_stream.checkpoint.files import FolderFiles
from rsq_stream.checkpoint.model_reader import ModelReader
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.errors import CheckpointError
from rsq_stream.model.online_rotation import KEY, rotated_linears
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD, block_prefix
from rsq_stream.model.transformers_layers import model_config, transformers_class

_GENERATION = "generation_config.json"


def load_model(
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load a folder that ``quantize`` made, or a source, ready to run.

    ``dtype`` is the type of the weights, by default that of the folder's norms. With a
    full rotation the inputs of o and down are rotated by hooks; what
    ``save_pretrained`` makes of the model says so, and comes back by this function.
    Activations are not rounded, also where the folder is to be served with fewer bits:
    ``eval`` does that.

    Raises
    ------
    CheckpointError
        There is no such folder, or it is not as config.json says.
    UnsupportedModelError
        Of a family, or quantized in a way, that this tool does not know.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    checkpoint = Checkpoint(FolderFiles(path))
    reader = ModelReader(checkpoint, torch.device("cpu"))
    architecture = reader.architecture
    dtype = dtype or reader.final_norm().dtype
    config = model_config(architecture.family, checkpoint.config)
    with torch.device("meta"):
        made = getattr(transformers, architecture.family.causal_class)(config)
    state = {EMBEDDING: reader.embedding(), FINAL_NORM: reader.final_norm()}
    state[LM_HEAD] = state[EMBEDDING] if architecture.tied else reader.head()
    for block in range(architecture.blocks):
        for name, tensor in reader.block_tensors(block).items():
            state[block_prefix(block) + name] = tensor.to(dtype)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    made.load_state_dict(state, strict=True, assign=True)
    made.tie_weights()
    # Its tables are no part of the state, and were made without memory.
    made.model.rotary_emb = transformers_class(architecture.family, "RotaryEmbedding")(
        config=config
    )
    _put_in(made, reader)
    quantization = checkpoint.config.get("quantization_config") or {}
    if KEY in quantization:
        config.quantization_config = {"quant_method": None, KEY: quantization[KEY]}
    config.dtype = dtype
    if (path / _GENERATION).is_file():
        made.generation_config = GenerationConfig.from_pretrained(path)
    model: PreTrainedModel = made.to(device).eval()
    return model


def _put_in(model: Any, reader: ModelReader) -> None:
    """Rotate the inputs of all o and down before these run."""
    online = reader.online
    linears = rotated_linears(reader.architecture)
    for kind, rotation, rotate in (
        ("heads", online.heads, online.of_attention),
        ("mlp", online.mlp, online.of_mlp),
    ):
        for block in model.model.layers if rotation is not None else ():
            block.get_submodule(linears[kind]).register_forward_pre_hook(
                partial(_rotated, rotate)
            )


def _rotated(
    rotate: Callable[[Tensor], Tensor], _: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (rotate(inputs[0]), *inputs[1:])
