"""Integers: codes are whole numbers, and runtimes read them.

A code is 0 .. 2**bits - 1 and decodes to round_to_model_type(s (code - z)). On
the symmetric grid z = 2**(bits-1), so the levels are -2**(bits-1) ..
2**(bits-1) - 1 times s; a negative s mirrors them, at no cost in the format.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.grids.base import Grid, GridPlan, picked, shrinking_shares
from rsq_stream.ops.clip_search import best_scale
from rsq_stream.ops.column_sweep import Swept, sweep
from rsq_stream.ops.descent import descend
from rsq_stream.ops.rounding import Rounded, round_columns
from rsq_stream.ops.scale_search import Searched, search_scales


class IntegerGrid(Grid):
    """Whole numbers around zero, or from a zero point for each group."""

    output_format: ClassVar[str] = "compressed-tensors"
    mixed_bits: ClassVar[bool] = True
    zero_points: ClassVar[bool] = True

    @classmethod
    def in_words(cls, *, symmetric: bool) -> str:
        """Return whether codes lie around zero or have zero points."""
        return "symmetric" if symmetric else "asymmetric"

    @classmethod
    def require_plan(cls, plan: GridPlan) -> None:
        """Take any plan: what all plans are held to is what integers can do."""

    @property
    def implied_zero(self) -> float:
        """The code in the middle, which stands for zero on the symmetric grid."""
        return float(2 ** (self.bits - 1))

    @property
    def _mirrored(self) -> bool:
        """Whether negative scales are tried."""
        return self.symmetric and self.signed_scales

    def search(
        self, target_RC: Float[Tensor, "R C"]
    ) -> tuple[Float[Tensor, "R"], Float[Tensor, "R"]]:
        """Return scale and zero point per row; scales are exact in the stored type.

        Candidates are full range times 1.00, 0.99, ... (``clip_steps`` of them),
        rounded to the stored type before they are tried. A row of zeros gets
        the scale 1.
        """
        if target_RC.is_cuda:
            return self.search_naive(target_RC)
        by = Searched(
            shares_P=shrinking_shares(self.clip_steps, target_RC.device),
            bits=self.bits,
            symmetric=self.symmetric,
            mirrored=self._mirrored,
            exponent=self.clip_exponent,
            storage_type=self.storage_type,
        )
        return search_scales(target_RC, by)

    def search_naive(
        self, target_RC: Float[Tensor, "R C"]
    ) -> tuple[Float[Tensor, "R"], Float[Tensor, "R"]]:
        """Search step by step, all rows at once, on any device."""
        low_R, high_R = target_RC.amin(dim=1), target_RC.amax(dim=1)
        if self.symmetric:
            full_R = torch.maximum(-low_R, high_R) / (2 ** (self.bits - 1) - 1)
            zero_R = torch.full_like(full_R, self.implied_zero)
        else:
            low_R, high_R = low_R.clamp(max=0), high_R.clamp(min=0)
            full_R = (high_R - low_R) / self.top
            safe_R = torch.where(full_R > 0, full_R, 1.0)
            zero_R = torch.round(-low_R / safe_R).clamp(0, self.top)
        shares_P = shrinking_shares(self.clip_steps, target_RC.device)
        scale_RP = self.stored_sizes(full_R[:, None] * shares_P)
        best_R = best_scale(
            target_RC,
            scale_RP,
            zero_R,
            top=self.top,
            exponent=self.clip_exponent,
            mirrored=self._mirrored,
        )
        return picked(scale_RP, best_R, mirrored=self._mirrored), zero_R

    def levels(
        self, scale_R: Float[Tensor, "R"], zero_R: Float[Tensor, "R"]
    ) -> Float[Tensor, "R L"]:
        """Return what each code decodes to, per row, as a loader computes it."""
        code_L = torch.arange(self.top + 1, dtype=torch.float32, device=scale_R.device)
        return self.rounded((code_L - zero_R[:, None]) * scale_R[:, None])

    def nearest(
        self,
        target_RC: Float[Tensor, "R C"],
        scale_R: Float[Tensor, "R"],
        zero_R: Float[Tensor, "R"],
    ) -> Float[Tensor, "R C"]:
        """Return the codes of plain rounding to nearest, as fp32 whole numbers."""
        code_RC = torch.round(target_RC * (1.0 / scale_R)[:, None]) + zero_R[:, None]
        return code_RC.clamp(0, self.top)

    def round(
        self,
        weight_RC: Tensor,
        scale_R: Tensor,
        zero_R: Tensor,
        level_RL: Tensor,
    ) -> Rounded:
        """Round a block of columns plainly (``ops/rounding.py``)."""
        return round_columns(weight_RC, scale_R, zero_R, level_RL)

    def units(self, code: Tensor, zero: Tensor) -> Tensor:
        """Return what codes stand for before the scale."""
        return code.float() - zero

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
        """Quantize a block of columns (``ops/column_sweep.py``)."""
        return sweep(
            target_RC,
            weight_RC,
            upper_CC,
            scale_R=scale_R,
            zero_R=zero_R,
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
        """Return better codes for a block of columns (``ops/descent.py``)."""
        return descend(
            code_RC,
            pull_RC,
            hessian_CC,
            scale_R=scale_R,
            zero_R=zero_R,
            level_RL=level_RL,
        )

    def decode(
        self, code_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor
    ) -> Float[Tensor, "O I"]:
        """Return the weights as a loader will see them, fp32."""
        return decode(code_OI, scale_OG, zero_OG, self.storage_type)


def decode(
    code_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, storage_type: torch.dtype
) -> Float[Tensor, "O I"]:
    """Compute round_to_model_type(s (code - z)) for a whole linear, in fp32.

    Shapes: codes ``[O, I]`` (any whole-number type), scales and zero points
    ``[O, G]`` with I divisible by G.
    """
    outputs, inputs = code_OI.shape
    code_OGC = code_OI.reshape(outputs, scale_OG.shape[1], -1).float()
    weight_OGC = (code_OGC - zero_OG[:, :, None].float()) * scale_OG[:, :, None].float()
    return weight_OGC.reshape(outputs, inputs).to(storage_type).float()


GRID = IntegerGrid
