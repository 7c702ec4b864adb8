"""Shards and sizes of an output, from headers alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from rsq_stream.checkpoint.formats.base import OutputTensor
from rsq_stream.checkpoint.output_tensors import output_tensors
from rsq_stream.checkpoint.shards import TYPE_NAMES, Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.tensor_names import EMBEDDING, HEAD


@dataclass(frozen=True)
class ShardLayout:
    """One output shard: its name, its header, where each tensor goes."""

    name: str
    header: bytes
    places: Mapping[str, tuple[int, OutputTensor]]
    """Offset from the file's start, and the tensor."""
    size_bytes: int


def lay_out(tensors: list[OutputTensor], shard_bytes: int) -> list[ShardLayout]:
    """Put tensors into shards of at most ``shard_bytes``, in their order."""
    runs: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if runs[-1] and filled + tensor.size_bytes > shard_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(tensor)
        filled += tensor.size_bytes
    return [
        _lay_out_one(f"model-{number:05}-of-{len(runs):05}.safetensors", run)
        for number, run in enumerate(runs, start=1)
    ]


def _lay_out_one(name: str, tensors: list[OutputTensor]) -> ShardLayout:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places, start = {}, len(header)
    for tensor in tensors:
        places[tensor.name] = (start, tensor)
        start += tensor.size_bytes
    return ShardLayout(name, header, places, start)


def index_of(layouts: list[ShardLayout]) -> dict[str, object]:
    """Give the content of ``model.safetensors.index.json``."""
    weight_map = {name: layout.name for layout in layouts for name in layout.places}
    total = sum(layout.size_bytes - len(layout.header) for layout in layouts)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def plan_layouts(
    checkpoint: Checkpoint, architecture: Architecture, plan: QuantizationPlan
) -> list[ShardLayout]:
    """Lay out the output's shards from headers and plan alone."""

    def dtype_of(name: str) -> torch.dtype:
        known = EMBEDDING if name == HEAD and architecture.tied else name
        return checkpoint.entry(known).dtype

    tensors = output_tensors(architecture, plan, dtype_of)
    return lay_out(tensors, plan.shard_bytes)


def bits_per_weight(architecture: Architecture, layouts: list[ShardLayout]) -> float:
    """Give the bits of the whole output per weight of the source model."""
    return _bits(layouts) / source_weights(architecture)


def output_bits(
    checkpoint: Checkpoint, architecture: Architecture, plan: QuantizationPlan
) -> int:
    """Count the bits of all tensors of a plan's output."""
    return _bits(plan_layouts(checkpoint, architecture, plan))


def _bits(layouts: list[ShardLayout]) -> int:
    return 8 * sum(
        tensor.size_bytes for layout in layouts for _, tensor in layout.places.values()
    )


def source_weights(architecture: Architecture) -> int:
    """Count the weights of the source model."""
    outer = sum(prod(shape) for shape in architecture.outer_shapes().values())
    return outer + sum(
        count * architecture.block_entries(block)
        for block, count in architecture.kinds().items()
    )
