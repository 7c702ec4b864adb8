"""Integers as compressed-tensors ``pack-quantized`` has them.

transformers and vLLM read it; 2, 3, 5, 6, 7 bits need compressed-tensors >= 0.18. Who
loads which bits was tried with transformers 5.23 and compressed-tensors 0.20, and read
in the sources of vLLM 0.33 and SGLang 0.5.23.
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.algorithm.grids.integer import IntegerGrid
from rsq_stream.checkpoint.formats._packed import PackedFormat
from rsq_stream.checkpoint.formats._targets import targets_by_scheme
from rsq_stream.checkpoint.formats.base import Loader
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import GROUP_SIZES, Scheme
from rsq_stream.model.architecture import Architecture

_OURS = {
    "type": ("int",),
    "strategy": ("channel", "group"),
    "dynamic": (False, None),
    "actorder": (None, "weight", "static"),
}
"""What we write, or what means the same; anything else would be read wrongly."""
_EVERYWHERE = {4, 8}
"""Bits that all runtimes have kernels for."""


class CompressedTensors(PackedFormat):
    """Whole numbers, for transformers, vLLM and SGLang."""

    config_name: ClassVar[str] = "pack-quantized"
    loads_with: ClassVar[Loader] = Loader(
        introduction="Load it with transformers and compressed-tensors (0.18 or"
        " newer):",
        imports="from transformers import AutoModelForCausalLM",
        function="AutoModelForCausalLM.from_pretrained",
        remark="transformers, compressed-tensors",
        tags=("compressed-tensors",),
    )

    def stores(self, grid: type[Grid]) -> bool:
        """Return whether codes are whole numbers: no other has a place here."""
        return issubclass(grid, IntegerGrid)

    def runtimes(self, bits: Collection[int], *, symmetric: bool) -> tuple[str, ...]:
        """Name the runtimes that take linears of such bits, and what each needs."""
        transformers = "transformers with compressed-tensors 0.18 or newer"
        if not symmetric:
            transformers += " (dequantize=True)"
        if _EVERYWHERE.issuperset(bits):
            return (transformers, "vLLM", "SGLang")
        return (transformers, "vLLM (its Humming kernel, sm_75 or newer)")

    def notices(self, plan: QuantizationPlan) -> list[str]:
        """Return what a user should know about loading zero points."""
        if plan.symmetric:
            return []
        notice = (
            "transformers loads asymmetric codes only with"
            " CompressedTensorsConfig(dequantize=True): a bug of compressed-tensors"
            " 0.18 to 0.20"
        )
        return [notice]

    def description(
        self, plan: QuantizationPlan, architecture: Architecture
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of quantized linears."""
        targets, ignored = targets_by_scheme(plan, architecture)
        return {
            "quant_method": "compressed-tensors",
            "format": self.config_name,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {
                    "targets": patterns,
                    "weights": _weight_arguments(scheme),
                    "input_activations": None,
                    "output_activations": None,
                    "format": self.config_name,
                }
                for number, (scheme, patterns) in enumerate(targets.items())
            },
            "ignore": ignored,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def scheme(
        self, weights: Mapping[str, Any], quantization: Mapping[str, Any]
    ) -> Scheme | None:
        """Read a group's scheme; None for one that this format does not write."""
        del quantization
        if any(weights.get(key) not in values for key, values in _OURS.items()):
            return None
        bits, size = int(weights["num_bits"]), int(weights["group_size"] or -1)
        known = bits in IntegerGrid.bit_widths and size in GROUP_SIZES
        return Scheme(bits, size, bool(weights["symmetric"])) if known else None


def _weight_arguments(scheme: Scheme) -> dict[str, Any]:
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


FORMAT = CompressedTensors()
