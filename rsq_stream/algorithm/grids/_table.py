"""Grids whose levels are those of a table, times the scale of a group or row."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.grids.base import Grid, picked, shrinking_shares
from rsq_stream.ops.column_sweep import Swept
from rsq_stream.ops.rounding import Rounded
from rsq_stream.ops.table import (
    best_table_scale,
    descend_table,
    middles,
    nearest_code,
    sweep_table,
)


class TableGrid(Grid):
    """A code stands for scale times value[code]; there is no zero point."""

    @property
    @abstractmethod
    def values(self) -> Float[Tensor, "L"]:
        """The values of the codes, ascending from -1 to 1."""

    def search(
        self, target_RC: Float[Tensor, "R C"]
    ) -> tuple[Float[Tensor, "R"], Float[Tensor, "R"]]:
        """Return scale and zero point (none: 0) per row, the scale exact as stored.

        Candidates are the largest weight times 1.00, 0.99, ..., because values reach
        from -1 to 1.
        """
        full_R = target_RC.abs().amax(dim=1)
        shares_P = shrinking_shares(self.clip_steps, target_RC.device)
        scale_RP = self.stored_sizes(full_R[:, None] * shares_P)
        best_R = best_table_scale(
            target_RC,
            scale_RP,
            self.values.to(target_RC.device),
            exponent=self.clip_exponent,
            mirrored=self.signed_scales,
        )
        scale_R = picked(scale_RP, best_R, mirrored=self.signed_scales)
        return scale_R, torch.zeros_like(scale_R)

    def codes(
        self, value_RC: Float[Tensor, "R C"], scale_R: Float[Tensor, "R"]
    ) -> Tensor:
        """Return the nearest codes, as whole numbers."""
        middle_M = middles(self.values.to(value_RC.device))
        return nearest_code(value_RC * (1.0 / scale_R)[:, None], middle_M)

    def units(self, code: Tensor, zero: Tensor) -> Tensor:
        """Return what codes stand for before the scale."""
        del zero
        return self.values.to(code.device)[code.long()]

    def levels(
        self, scale_R: Float[Tensor, "R"], zero_R: Float[Tensor, "R"]
    ) -> Float[Tensor, "R L"]:
        """Return what each code decodes to, per row, as a loader computes it."""
        del zero_R
        return self.rounded(self.values.to(scale_R) * scale_R[:, None])

    def nearest(
        self,
        target_RC: Float[Tensor, "R C"],
        scale_R: Float[Tensor, "R"],
        zero_R: Float[Tensor, "R"],
    ) -> Float[Tensor, "R C"]:
        """Return the nearest codes, as fp32 whole numbers."""
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

    def sweep(
        self,
        target_RC: Tensor,
        weight_RC: Tensor,
        upper_CC: Tensor,
        *,
        scale_R: Tensor,
        zero_R: Tensor,
        level_RL: Tensor,
    ) -> Swept:
        """Quantize a block of columns (``ops/table.py``)."""
        del zero_R
        return sweep_table(
            target_RC,
            weight_RC,
            upper_CC,
            scale_R=scale_R,
            value_L=self.values.to(target_RC.device),
            level_RL=level_RL,
        )

    def descend(
        self,
        code_RC: Tensor,
        pull_RC: Tensor,
        hessian_CC: Tensor,
        *,
        scale_R: Tensor,
        zero_R: Tensor,
        level_RL: Tensor,
    ) -> Tensor:
        """Return better codes for a block of columns (``ops/table.py``)."""
        del zero_R
        return descend_table(
            code_RC,
            pull_RC,
            hessian_CC,
            scale_R=scale_R,
            value_L=self.values.to(code_RC.device),
            level_RL=level_RL,
        )

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
