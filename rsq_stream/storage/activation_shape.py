"""How many activations a slot holds, and how they are cut into units."""

from typing import NamedTuple

import torch

from rsq_stream.config.quantization_plan import QuantizationPlan


class SlotShape(NamedTuple):
    """The shape of every slot of a run, and how it is cut into units."""

    sequences: int
    tokens: int
    width: int
    unit_sequences: int
    dtype: torch.dtype

    @property
    def units(self) -> int:
        """Chunks of a slot; the last one may hold fewer sequences."""
        return -(-self.sequences // self.unit_sequences)

    @property
    def unit_bytes(self) -> int:
        """Bytes of a full chunk."""
        return self.unit_sequences * self.tokens * self.width * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of a whole slot."""
        return self.sequences * self.tokens * self.width * self.dtype.itemsize

    def unit_shape(self, unit: int) -> tuple[int, int, int]:
        """Return the shape of one unit's activations."""
        first = unit * self.unit_sequences
        count = min(self.unit_sequences, self.sequences - first)
        return count, self.tokens, self.width


def slot_shape(plan: QuantizationPlan, width: int) -> SlotShape:
    """Return the shape of a run's slots."""
    return SlotShape(
        sequences=plan.sequences,
        tokens=plan.sequence_length,
        width=width,
        unit_sequences=plan.unit_sequences,
        dtype=getattr(torch, plan.cache_type),
    )
