"""The E8P lattice grid: 8 weights share a codeword of 16 bits, a row its scale.

In memory a code is a weight's digit (``ops/e8p_codebook.py``), so solver, refit and
descent treat it as any grid with a table; that 8 digits are a codeword, the sweep and
the descent see to, which work in blocks of 8 columns.
"""

from collections.abc import Collection
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.grids._table import TableGrid
from rsq_stream.algorithm.grids.base import GridPlan
from rsq_stream.errors import require
from rsq_stream.ops.column_sweep import Swept
from rsq_stream.ops.e8p import (
    descend_lattice,
    round_lattice,
    rounding_errors,
    sweep_lattice,
)
from rsq_stream.ops.e8p_codebook import digit_values, to_digits, to_indices

_GAUSSIAN = 1.03
"""RMS of a Gaussian row over its best scale: a relative error of 0.092."""
_CANDIDATES = tuple(0.70 + 0.05 * step for step in range(17))
"""Scales that are tried for rounding, as shares of the Gaussian optimum."""


class LatticeGrid(TableGrid):
    """E8P: 2 bits a weight, a scale a row; it is its own mirror."""

    title: ClassVar[str] = "E8P lattice"
    bit_widths: ClassVar[Collection[int]] = (2,)
    takes_groups: ClassVar[bool] = False
    takes_signed_scales: ClassVar[bool] = False
    inputs_per_code: ClassVar[int] = 8
    trials: ClassVar[tuple[float, ...]] = (0.92, 0.96, 1.04, 1.08, 1.13)

    @classmethod
    def require_plan(cls, plan: GridPlan) -> None:
        """Refuse what the lattice cannot do, other error norms among it.

        Raises
        ------
        UsageError
            With the option, what it must be and what it is.
        """
        option = f"with --grid {plan.grid}"
        squared = plan.clip_exponent == 2
        require(squared, "clip-exponent", plan.clip_exponent, f"2 {option}")
        alone = not plan.override_bits
        require(alone, "override", "other bits", f"PATTERN=16 {option}")
        super().require_plan(plan)

    @property
    def values(self) -> Float[Tensor, "L"]:
        """The values of the digits, ascending: odd multiples of 1/4 up to 11/4."""
        return digit_values()

    def search(
        self, target_RC: Float[Tensor, "R C"]
    ) -> tuple[Float[Tensor, "R"], Float[Tensor, "R"]]:
        """Return the scale per row that rounds it best, exact as stored; zero is 0."""
        share_P = torch.tensor(_CANDIDATES, device=target_RC.device)
        usual_R = target_RC.square().mean(dim=1).sqrt() / _GAUSSIAN
        # No codeword is 0: a row of zeros gets as little as can be stored.
        usual_R = usual_R.clamp(min=torch.finfo(self.storage_type).tiny)
        scale_RP = self.stored_sizes(usual_R[:, None] * share_P)
        best_R1 = rounding_errors(target_RC, scale_RP).argmin(dim=1, keepdim=True)
        scale_R = scale_RP.gather(1, best_R1)[:, 0]
        return scale_R, torch.zeros_like(scale_R)

    def codes(
        self, value_RC: Float[Tensor, "R C"], scale_R: Float[Tensor, "R"]
    ) -> Tensor:
        """Return the nearest codewords' digits."""
        return round_lattice(value_RC, scale_R)

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
        """Quantize a block of columns, 8 by 8; codes are digits."""
        del zero_R
        return sweep_lattice(
            target_RC, weight_RC, upper_CC, scale_R=scale_R, level_RL=level_RL
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
        """Return better digits for a block of columns, 8 at a time."""
        del zero_R
        return descend_lattice(
            code_RC, pull_RC, hessian_CC, scale_R=scale_R, level_RL=level_RL
        )

    def packed_shape(
        self, outputs: int, inputs: int
    ) -> tuple[torch.dtype, tuple[int, int]]:
        """Return type and shape of a linear's codewords, 16 bits for 8 inputs."""
        return torch.int16, (outputs, inputs // self.inputs_per_code)

    def pack(self, code_OI: Tensor) -> Tensor:
        """Pack 8 digits into the index of their codeword."""
        index_ON = to_indices(code_OI)
        # The same 16 bits, as safetensors' signed type has them.
        return torch.where(index_ON >= 2**15, index_ON - 2**16, index_ON).to(
            torch.int16
        )

    def unpack(self, packed_OW: Tensor, inputs: int) -> Tensor:
        """Unpack codewords to digits."""
        del inputs
        return to_digits(packed_OW.int() & 0xFFFF)


GRID = LatticeGrid
