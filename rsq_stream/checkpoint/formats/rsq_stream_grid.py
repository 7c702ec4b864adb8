"""Grids that no runtime reads, for ``rsq_stream.load_model``.

NormalFloat has the tensors of compressed-tensors, and its codes stand for the values of
``algorithm/grids/nf.py``. The ``weight_packed`` of E8P is int16 [O, I / 8]: the 16 bits
of an index of ``ops/e8p_codebook.py`` for each 8 weights.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.checkpoint.formats._packed import PackedFormat
from rsq_stream.checkpoint.formats._targets import targets_by_scheme
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import GROUP_SIZES, Scheme
from rsq_stream.model.architecture import Architecture


class RsqStreamGrid(PackedFormat):
    """The codes of any grid without zero points, by the grid's name."""

    config_name: ClassVar[str] = "rsq-stream-grid"

    def stores(self, grid: type[Grid]) -> bool:
        """Return whether there are no zero points, which config.json does not name."""
        return not grid.zero_points

    def notices(self, plan: QuantizationPlan) -> list[str]:
        """Return what a user should know about loading the grid."""
        notice = (
            f"no runtime reads --grid {plan.grid}: rsq_stream.load_model gives a"
            " transformers model with decoded weights"
        )
        return [notice]

    def description(
        self, plan: QuantizationPlan, architecture: Architecture
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` of quantized linears.

        An unknown ``quant_method`` only makes transformers warn and go on with random
        weights. At null it says that the model is not quantized as it should be, and
        stops.
        """
        targets, ignored = targets_by_scheme(plan, architecture)
        return {
            "quant_method": None,
            "format": self.config_name,
            "grid": plan.grid,
            "config_groups": {
                f"group_{number}": {
                    "targets": patterns,
                    "weights": {
                        "num_bits": scheme.bits,
                        "group_size": None
                        if scheme.group_size == -1
                        else scheme.group_size,
                    },
                }
                for number, (scheme, patterns) in enumerate(targets.items())
            },
            "ignore": ignored,
            "load_with": self.loads_with.function,
        }

    def scheme(
        self, weights: Mapping[str, Any], quantization: Mapping[str, Any]
    ) -> Scheme | None:
        """Read a group's scheme; None for one that this format does not write."""
        name = quantization["grid"]
        if name not in GRIDS or not self.stores(GRIDS[name]):
            return None
        grid = GRIDS[name]
        bits, size = int(weights["num_bits"]), int(weights["group_size"] or -1)
        sizes = GROUP_SIZES if grid.takes_groups else (-1,)
        known = bits in grid.bit_widths and size in sizes
        return Scheme(bits, size, symmetric=True, grid=name) if known else None


FORMAT = RsqStreamGrid()
