"""Better scales and codes for a row that the sweep has quantized already.

The sweep decides a column before it has seen those to the right. Afterwards both
can be improved against the whole Hessian, each step closed and none raising the
loss e (H + lambda I) e^T of a row:

- refit: the scale of a group that fits its codes best, by least squares in the
  Hessian's norm: s += (k H e^T) / (k H k^T), k what the codes stand for
  (of integers the codes less the zero point). The stored type is respected: a scale
  moves only where its rounded value gains.
- descent: each code in turn moves to the level nearest its minimiser
  (``ops/descent.py``; cyclic coordinate descent, as in QuantEase, arXiv 2309.01885).
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rsq_stream.algorithm.gptq.ldl import Factor, wide_blocks
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.ops.column_layout import plus_product, product


@dataclass(kw_only=True)
class SweptTile:
    """A tile of rows after the sweep."""

    code_RI: Shaped[Tensor, "R I"]
    error_RI: Float[Tensor, "R I"]
    """weight - decoded, always that of the present codes and scales."""
    scale_RG: Float[Tensor, "R G"]
    zero_RG: Float[Tensor, "R G"]
    loss_R: Float[Tensor, "R"]
    """e (H + lambda I) e^T of each row; 0 where it is not asked for."""

    def take_better_rows(self, other: "SweptTile") -> None:
        """Take over the rows in which the other leaves less of a loss."""
        better_R = other.loss_R < self.loss_R
        for field in fields(self):
            getattr(self, field.name)[better_R] = getattr(other, field.name)[better_R]


@dataclass(kw_only=True)
class Refinement:
    """One tile of rows with its codes, on the way to better ones."""

    tile: SweptTile
    weight_RI: Float[Tensor, "R I"]
    factor: Factor
    grid: Grid
    group_size: int
    """Columns per scale; -1 for one scale a row."""

    def run(self, sweeps: int, *, refit: bool) -> None:
        """Improve in place: ``sweeps`` passes of descent, each after a refit."""
        for _ in range(max(sweeps, int(refit))):
            if refit and self.group_size == -1:
                self._refit_rows()
            for first, last in wide_blocks(self.weight_RI.shape[1], self._width):
                pull_RW, hessian_WW = self.factor.gradients(
                    self.tile.error_RI, first, last
                )
                for start in range(first, last, self._width):
                    end = min(start + self._width, last)
                    own, later = (
                        slice(start - first, end - first),
                        slice(end - first, None),
                    )
                    before_RC = self.tile.error_RI[:, start:end].clone()
                    self._improve(
                        slice(start, end),
                        pull_RW[:, own],
                        hessian_WW[own, own],
                        refit=refit,
                        descent=sweeps > 0,
                    )
                    moved_RC = self.tile.error_RI[:, start:end] - before_RC
                    pull_RW[:, later].addmm_(moved_RC, hessian_WW[own, later])

    @property
    def _width(self) -> int:
        """Columns that are improved at a time: a group's, or a tile's."""
        if self.group_size == -1:
            return self.factor.tile
        return self.group_size

    def _improve(
        self,
        columns: slice,
        pull_RC: Tensor,
        hessian_CC: Tensor,
        *,
        refit: bool,
        descent: bool,
    ) -> None:
        """Refit and descend within one group (one tile, for one scale a row)."""
        group = 0 if self.group_size == -1 else columns.start // self.group_size
        if refit and self.group_size != -1:
            step_RC = self._refit(columns, group, pull_RC, hessian_CC)
            pull_RC = plus_product(pull_RC, step_RC, hessian_CC, alpha=-1)
        if descent:
            scale_R, zero_R = self.tile.scale_RG[:, group], self.tile.zero_RG[:, group]
            self.tile.code_RI[:, columns] = self.grid.descend(
                self.tile.code_RI[:, columns],
                pull_RC,
                hessian_CC,
                scale_R=scale_R,
                zero_R=zero_R,
                level_RL=self.grid.levels(scale_R, zero_R),
            )
            self._decode(columns, group)

    def _refit(
        self, columns: slice, group: int, pull_RC: Tensor, hessian_CC: Tensor
    ) -> Tensor:
        """Move a group's scales where that gains; gives by how much values moved."""
        steps_RC = self._units(columns, group)
        gain_R = (steps_RC * pull_RC).sum(1)
        energy_R = (product(steps_RC, hessian_CC) * steps_RC).sum(1)
        before_RC = self.tile.error_RI[:, columns].clone()
        self._move(group, gain_R, energy_R)
        self._decode(columns, group)
        return before_RC - self.tile.error_RI[:, columns]

    def _refit_rows(self) -> None:
        """Do the same for one scale a row: both sums go over all columns."""
        gain_R = torch.zeros_like(self.tile.scale_RG[:, 0])
        energy_R = torch.zeros_like(gain_R)
        steps_RI = self._units(slice(None), 0)
        for start, end in wide_blocks(self.weight_RI.shape[1], self._width):
            steps_RW = steps_RI[:, start:end]
            for part_RI, sum_R in ((self.tile.error_RI, gain_R), (steps_RI, energy_R)):
                pull_RW, _ = self.factor.gradients(part_RI, start, end)
                sum_R += (steps_RW * pull_RW).sum(1)
        self._move(0, gain_R, energy_R)
        for start, end in wide_blocks(self.weight_RI.shape[1], self._width):
            self._decode(slice(start, end), 0)

    def _move(self, group: int, gain_R: Tensor, energy_R: Tensor) -> None:
        """Add gain / energy to the scales, rounded as stored, where the loss falls."""
        scale_R = self.tile.scale_RG[:, group]
        wanted_R = scale_R + gain_R / energy_R.clamp(
            min=torch.finfo(torch.float32).tiny
        )
        moved_R = self.grid.stored(wanted_R)
        step_R = moved_R - scale_R
        better_R = (2 * gain_R - step_R * energy_R) * step_R > 0
        # A scale that would change its sign belongs to other codes.
        better_R &= (moved_R * scale_R > 0) & moved_R.isfinite()
        self.tile.scale_RG[:, group] = torch.where(better_R, moved_R, scale_R)

    def _units(self, columns: slice, group: int) -> Tensor:
        """Return what codes of a group stand for before the scale."""
        return self.grid.units(
            self.tile.code_RI[:, columns], self.tile.zero_RG[:, group, None]
        )

    def _decode(self, columns: slice, group: int) -> None:
        """Bring the errors up to date, with values as a loader computes them."""
        steps_RC = self._units(columns, group)
        decoded_RC = self.grid.rounded(steps_RC * self.tile.scale_RG[:, group, None])
        self.tile.error_RI[:, columns] = self.weight_RI[:, columns] - decoded_RC
