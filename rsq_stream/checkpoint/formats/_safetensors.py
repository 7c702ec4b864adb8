"""Formats in a Hugging Face folder: safetensors shards, their index, config.json."""

import json
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from rsq_stream.checkpoint.formats._targets import schemes_by_name
from rsq_stream.checkpoint.formats.base import (
    Format,
    OutputTensor,
    ShardLayout,
    json_bytes,
)
from rsq_stream.checkpoint.shards import INDEX, TYPE_NAMES
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import Scheme
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.online_rotation import KEY, written_rotations

_CONFIG = "config.json"


class SafetensorsFormat(Format):
    """A format whose ``quantization_config`` says which linears are stored how."""

    shard_name: ClassVar[re.Pattern[str]] = re.compile(
        r"model-\d{5}-of-\d{5}\.safetensors"
    )
    small_file_names: ClassVar[frozenset[str]] = frozenset({_CONFIG, INDEX})

    @abstractmethod
    def description(
        self, plan: QuantizationPlan, architecture: Architecture
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of quantized linears."""

    @abstractmethod
    def scheme(
        self, weights: Mapping[str, Any], quantization: Mapping[str, Any]
    ) -> Scheme | None:
        """Read a group's scheme; None for one that this format does not write."""

    def layouts(
        self, tensors: list[OutputTensor], shard_bytes: int
    ) -> list[ShardLayout]:
        """Put tensors into shards of at most ``shard_bytes``, in their order."""
        return lay_out(tensors, shard_bytes)

    def small_files(
        self,
        config: Mapping[str, Any],
        plan: QuantizationPlan,
        architecture: Architecture,
        layouts: list[ShardLayout],
    ) -> dict[str, bytes]:
        """Return config.json, with a ``quantization_config`` if need be, and index."""
        quantization = self.quantization_config(plan, architecture)
        own = {"quantization_config": quantization} if quantization else {}
        return {
            _CONFIG: json_bytes({**config, **own}),
            INDEX: json_bytes(index_of(layouts)),
        }

    def quantization_config(
        self, plan: QuantizationPlan, architecture: Architecture
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of config.json; empty for none.

        With a full rotation its ``quant_method`` is null, which every loader refuses:
        of one that is merely unknown, transformers warns and goes on with random
        weights.
        """
        rotate_only = plan.method == "rotate"
        config = {} if rotate_only else self.description(plan, architecture)
        if plan.rotates_online:
            config |= {"quant_method": None, KEY: written_rotations(plan, architecture)}
        return config

    def recognizes(self, quantization: Mapping[str, Any]) -> bool:
        """Return whether a ``quantization_config`` names this format."""
        return bool(quantization.get("format") == self.config_name)

    def schemes(
        self, quantization: Mapping[str, Any], architecture: Architecture
    ) -> dict[str, Scheme | None]:
        """Read each linear's scheme back by its full name, None if unquantized."""
        return schemes_by_name(
            quantization,
            architecture,
            lambda weights: self.scheme(weights, quantization),
        )


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
    """Return the content of ``model.safetensors.index.json``."""
    weight_map = {name: layout.name for layout in layouts for name in layout.places}
    total = sum(layout.size_bytes - len(layout.header) for layout in layouts)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
