"""One tile of rows on its way through all columns.

Per block of columns one product with the errors so far, then the sweep; afterwards
refit and descent (``polish.py``). A grid may have several scales of a row tried: the
row is swept with each, and keeps the one that leaves the least loss.
"""

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from rsq_stream.algorithm.factor import Factor, wide_blocks
from rsq_stream.algorithm.grid import Grid
from rsq_stream.algorithm.loss import weighted_losses
from rsq_stream.algorithm.polish import Polish

_COLUMNS = 2048
"""Columns that are rounded again at a time; a multiple of any lattice's width."""


@dataclass
class Tile:
    """What one tile of rows came to."""

    code_RI: Tensor
    nearest_RI: Tensor
    scale_RG: Tensor
    zero_RG: Tensor
    losses: Tensor
    """fp64: the solver's loss, rounding's, and the energy tr(W H W^T)."""


def solve_tile(
    weight_RI: Tensor,
    *,
    factor: Factor,
    grid: Grid,
    group_size: int,
    dynamic_scales: bool,
    sweeps: int,
    refit: bool,
) -> Tile:
    """Quantize a tile of rows; ``solver.solve`` says what the arguments are."""
    sweep_tile = partial(
        _sweep_tile, weight_RI, factor, grid, group_size, dynamic_scales=dynamic_scales
    )
    if group_size == -1:
        found_R, zero_R = grid.search(weight_RI)
        made = sweep_tile((found_R, zero_R))
        for share in grid.trials:
            tried = sweep_tile((grid.stored(found_R * share), zero_R))
            made.take_better_rows(tried)
    else:
        made = sweep_tile(None)
    if sweeps or refit:
        polish = Polish(
            weight_RI,
            made.code_RI,
            made.scale_RG,
            made.zero_RG,
            made.error_RI,
            factor,
            grid,
            group_size,
        )
        polish.run(sweeps, refit=refit)
    if sweeps or refit or grid.trials:
        # Rounding is compared with the scales that are kept.
        _round_again(weight_RI, made, grid)
    others = (made.nearest_error_RI, weight_RI)
    if sweeps or refit:
        losses = weighted_losses((made.error_RI, *others), factor)
    else:
        # The sweep's own sum, which has lambda in it, spares a product.
        solved = made.loss_R.sum(dtype=torch.float64)
        solved -= factor.damp * made.error_RI.square().sum(dtype=torch.float64)
        rest = weighted_losses(others, factor)
        losses = torch.cat([solved.clamp(min=0)[None], rest])
    return Tile(made.code_RI, made.nearest_RI, made.scale_RG, made.zero_RG, losses)


@dataclass
class _Swept:
    """A tile of rows after the sweep."""

    code_RI: Tensor
    error_RI: Tensor
    nearest_RI: Tensor
    nearest_error_RI: Tensor
    scale_RG: Tensor
    zero_RG: Tensor
    loss_R: Tensor
    """e (H + lambda I) e^T of each row."""

    def take_better_rows(self, other: "_Swept") -> None:
        """Take over the rows in which the other leaves less of a loss."""
        better_R = other.loss_R < self.loss_R
        for field in fields(self):
            getattr(self, field.name)[better_R] = getattr(other, field.name)[better_R]


def _sweep_tile(
    weight_RI: Tensor,
    factor: Factor,
    grid: Grid,
    group_size: int,
    given: tuple[Tensor, Tensor] | None,
    *,
    dynamic_scales: bool,
) -> _Swept:
    """Take a tile of rows through all columns.

    ``given`` are scale and zero point of each row; without them, groups have their own.
    """
    rows, inputs = weight_RI.shape
    block = factor.tile if group_size == -1 else group_size
    groups = 1 if group_size == -1 else inputs // group_size
    error_RI = torch.empty_like(weight_RI)
    nearest_error_RI = torch.empty_like(weight_RI)
    code_RI = torch.empty(rows, inputs, dtype=torch.uint8, device=weight_RI.device)
    nearest_RI = torch.empty_like(code_RI)
    scale_RG = weight_RI.new_empty(rows, groups)
    zero_RG = weight_RI.new_empty(rows, groups)
    loss_R = torch.zeros_like(weight_RI[:, 0])
    for first, last in wide_blocks(inputs, block):
        # The errors of all earlier blocks, for some blocks at once.
        owed_RW = torch.addmm(
            weight_RI[:, first:last],
            error_RI[:, :first],
            factor.matrix_II[:first, first:last],
        )
        for start in range(first, last, block):
            columns = slice(start, min(start + block, last))
            weight_RC = weight_RI[:, columns]
            target_RC = torch.addmm(
                owed_RW[:, start - first : columns.stop - first],
                error_RI[:, first:start],
                factor.matrix_II[first:start, columns],
            )
            unit_CC = factor.matrix_II[columns, columns].triu(1)
            group = 0 if group_size == -1 else start // block
            if group_size != -1:
                searched_RC = (
                    _current(weight_RC, target_RC, unit_CC)
                    if dynamic_scales
                    else weight_RC
                )
                scale_RG[:, group], zero_RG[:, group] = grid.search(searched_RC)
            elif start == 0 and given is not None:
                scale_RG[:, 0], zero_RG[:, 0] = given
            scale_R, zero_R = scale_RG[:, group].clone(), zero_RG[:, group].clone()
            level_RL = grid.levels(scale_R, zero_R)
            code_RI[:, columns], error_RC = grid.sweep(
                target_RC, weight_RC, unit_CC, scale_R, zero_R, level_RL
            )
            error_RI[:, columns] = error_RC
            nearest_RC = grid.nearest(weight_RC, scale_R, zero_R)
            nearest_RI[:, columns] = nearest_RC
            nearest_error_RI[:, columns] = weight_RC - level_RL.gather(
                1, nearest_RC.long()
            )
            left_RC = torch.addmm(error_RC, error_RC, unit_CC) + (target_RC - weight_RC)
            loss_R += left_RC.square() @ factor.scale_I[columns]
    return _Swept(
        code_RI, error_RI, nearest_RI, nearest_error_RI, scale_RG, zero_RG, loss_R
    )


def _round_again(weight_RI: Tensor, made: _Swept, grid: Grid) -> None:
    """Replace the codes of plain rounding by those with the scales that are kept.

    Some columns at a time: on a GPU a tile is large, and each step of this a copy.
    """
    inputs, groups = weight_RI.shape[1], made.scale_RG.shape[1]
    size = inputs // groups
    step = size * max(1, _COLUMNS // size) if groups > 1 else _COLUMNS
    for start in range(0, inputs, step):
        columns = slice(start, min(start + step, inputs))
        own = slice(start // size, -(-columns.stop // size))
        width = (columns.stop - start) // (own.stop - own.start)
        scale_RC, zero_RC = (
            part_RG[:, own].repeat_interleave(width, dim=1)
            for part_RG in (made.scale_RG, made.zero_RG)
        )
        weight_RC = weight_RI[:, columns]
        code_RC = grid.codes(weight_RC, scale_RC, zero_RC)
        made.nearest_RI[:, columns] = code_RC.to(torch.uint8)
        made.nearest_error_RI[:, columns] = weight_RC - grid.rounded(
            grid.units(code_RC, zero_RC) * scale_RC
        )


def _current(weight_RC: Tensor, target_RC: Tensor, unit_CC: Tensor) -> Tensor:
    """Give the best continuous values of a group, all earlier errors made up for.

    These are the weights that GPTQ has in place when it reaches the group. The
    sweep's targets leave out what the group's own columns will add; taking that
    back is one triangular solve: w + (E U)[:, group] U[group, group]^-1.
    """
    owed_RC: Tensor = torch.linalg.solve_triangular(
        unit_CC, target_RC - weight_RC, upper=True, left=False, unitriangular=True
    )
    return weight_RC + owed_RC
