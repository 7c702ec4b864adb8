"""Load an output of this tool as a transformers model, its weights decoded."""

from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from rsq_stream.evaluation.reader import ModelReader
from rsq_stream.storage.files import open_files
from rsq_stream.storage.shards import Checkpoint


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Give the model of a folder, every weight in full precision and in memory.

    Parameters
    ----------
    folder
        An output of ``quantize``, of any grid and format, or a source.
    dtype
        Type of the weights; by default the one that norms and embedding are stored in.

    Raises
    ------
    CheckpointError
        What is stored does not fit config.json, or is not what this tool writes.
    """
    checkpoint = Checkpoint(open_files(str(folder)))
    reader = ModelReader(checkpoint, torch.device("cpu"))
    dtype = dtype or reader.stored_type
    place = checkpoint.files.path("config.json").parent
    config = AutoConfig.from_pretrained(place)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state: dict[str, Tensor] = {
        name: tensor.to(dtype) for name, tensor in reader.tensors()
    }
    kind = getattr(transformers, reader.architecture.family.causal_class)
    model: PreTrainedModel = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype
    )
    if (place / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    model.eval()
    return model
