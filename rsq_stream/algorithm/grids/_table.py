"""Grids whose levels are those of a table, times the scale of a group or row."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.grids.integer import Grid
from rsq_stream.ops.rounding import Rounded


class TableGrid(Grid):
    """A code stands for scale times value[code]; there is no zero point."""

    @property
    @abstractmethod
    def values(self) -> Float[Tensor, "L"]:
        """What the codes stand for, ascending."""

    @abstractmethod
    def codes(
        self, value_RC: Float[Tensor, "R C"], scale_R: Float[Tensor, "R"]
    ) -> Tensor:
        """Give the nearest codes, as whole numbers."""

    def units(self, code: Tensor, zero: Tensor) -> Tensor:
        """Give what codes stand for before the scale."""
        del zero
        return self.values.to(code.device)[code.long()]

    def levels(
        self, scale_R: Float[Tensor, "R"], zero_R: Float[Tensor, "R"]
    ) -> Float[Tensor, "R L"]:
        """Give what each code decodes to, per row, as a loader computes it."""
        del zero_R
        return self.rounded(self.values.to(scale_R) * scale_R[:, None])

    def nearest(
        self,
        target_RC: Float[Tensor, "R C"],
        scale_R: Float[Tensor, "R"],
        zero_R: Float[Tensor, "R"],
    ) -> Float[Tensor, "R C"]:
        """Give the nearest codes, as fp32 whole numbers."""
        del zero_R
        return self.codes(target_RC, scale_R).float()

    def round(
        self,
        weight_RC: Tensor,
        scale_R: Tensor,
        zero_R: Tensor,
        level_RL: Tensor,
    ) -> Rounded:
        """Round a block of columns plainly."""
        del zero_R
        code_RC = self.codes(weight_RC, scale_R)
        error_RC = weight_RC - level_RL.gather(1, code_RC.long())
        return Rounded(code_RC.to(torch.uint8), error_RC)

    def decode(
        self, code_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor
    ) -> Float[Tensor, "O I"]:
        """Compute round_to_model_type(s value[code]) for a whole linear, in fp32."""
        del zero_OG
        return decode_table(code_OI, scale_OG, self.values, self.storage_type)


def decode_table(
    code_OI: Tensor, scale_OG: Tensor, value_L: Tensor, storage_type: torch.dtype
) -> Float[Tensor, "O I"]:
    """Compute round_to_model_type(s value[code]) for a whole linear, in fp32.

    Codes are ``[O, I]``, below the length of the table; scales ``[O, G]`` with I
    divisible by G.
    """
    outputs, inputs = code_OI.shape
    unit_OI = value_L.to(code_OI.device)[code_OI.long()]
    unit_OGC = unit_OI.reshape(outputs, scale_OG.shape[1], -1)
    weight_OGC = unit_OGC * scale_OG[:, :, None].float()
    return weight_OGC.reshape(outputs, inputs).to(storage_type).float()
