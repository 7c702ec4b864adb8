"""One tile of rows on its way through all columns.

Per block of columns one product with the errors so far, then the sweep; afterwards
refit and descent (``refine.py``). A grid may have several scales of a row tried: the
row is swept with each, and keeps the one that leaves the least loss. In the end all
is compared with plain rounding to the scales that are kept.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.gptq.ldl import Factor, wide_blocks
from rsq_stream.algorithm.gptq.loss import squared_norm, weighted_losses
from rsq_stream.algorithm.gptq.refine import Refinement, SweptTile
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.ops.column_layout import empty, laid_out, plus_product, product

_COLUMNS = 2048
"""Columns that are rounded at a time; a multiple of any lattice's width."""


@dataclass
class Tile:
    """What one tile of rows came to."""

    code_RI: Tensor
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
    inverse_GCC: Tensor | None,
    sweeps: int,
    refit: bool,
) -> Tile:
    """Quantize a tile of rows; ``solver.solve`` says what the arguments are."""
    weight_RI = laid_out(weight_RI)
    polished = refit or sweeps > 0
    sweep_tile = partial(
        _sweep_tile,
        weight_RI,
        factor=factor,
        grid=grid,
        group_size=group_size,
        inverse_GCC=inverse_GCC,
        measured=bool(grid.trials) or not polished,
    )
    if group_size == -1:
        scale_R, zero_R = grid.search(weight_RI)
        tile = sweep_tile(row_scales=(scale_R, zero_R))
        for share in grid.trials:
            trial = sweep_tile(row_scales=(grid.stored(scale_R * share), zero_R))
            tile.take_better_rows(trial)
    else:
        tile = sweep_tile(row_scales=None)
    if polished:
        polish = Refinement(
            tile=tile,
            weight_RI=weight_RI,
            factor=factor,
            grid=grid,
            group_size=group_size,
        )
        polish.run(sweeps, refit=refit)
    _, nearest_error_RI = round_tile(weight_RI, tile.scale_RG, tile.zero_RG, grid)
    others = (nearest_error_RI, weight_RI)
    if polished:
        losses = weighted_losses((tile.error_RI, *others), factor)
    else:
        # The sweep's own sum, which has lambda in it, spares a product.
        solved = tile.loss_R.sum(dtype=torch.float64)
        solved -= factor.damp * squared_norm(tile.error_RI)
        rest = weighted_losses(others, factor)
        losses = torch.cat([solved.clamp(min=0)[None], rest])
    return Tile(
        tile.code_RI.contiguous(),
        tile.scale_RG.contiguous(),
        tile.zero_RG.contiguous(),
        losses,
    )


def _sweep_tile(
    weight_RI: Tensor,
    *,
    factor: Factor,
    grid: Grid,
    group_size: int,
    inverse_GCC: Tensor | None,
    row_scales: tuple[Tensor, Tensor] | None,
    measured: bool,
) -> SweptTile:
    """Take a tile of rows through all columns.

    ``row_scales`` holds scale and zero point of each row; without it, each group is
    searched when the sweep reaches it.
    """
    rows, inputs = weight_RI.shape
    block = factor.tile if group_size == -1 else group_size
    groups = 1 if group_size == -1 else inputs // group_size
    error_RI = torch.empty_like(weight_RI)
    code_RI = empty(rows, inputs, weight_RI, torch.uint8)
    scale_RG, zero_RG = (empty(rows, groups, weight_RI) for _ in range(2))
    loss_R = torch.zeros_like(weight_RI[:, 0])
    if row_scales is not None:
        scale_R, zero_R = scale_RG[:, 0], zero_RG[:, 0] = row_scales
    for first, last in wide_blocks(inputs, block):
        # What all earlier blocks' errors leave to be made up for, for some at once.
        feedback_RW = product(error_RI[:, :first], factor.matrix_II[:first, first:last])
        for start in range(first, last, block):
            columns = slice(start, min(start + block, last))
            weight_RC = weight_RI[:, columns]
            owed_RC = plus_product(
                feedback_RW[:, start - first : columns.stop - first],
                error_RI[:, first:start],
                factor.matrix_II[first:start, columns],
            )
            if row_scales is None:
                group = start // block
                searched_RC = (
                    weight_RC
                    if inverse_GCC is None
                    else plus_product(weight_RC, owed_RC, inverse_GCC[group])
                )
                scale_R, zero_R = grid.search(searched_RC)
                scale_RG[:, group], zero_RG[:, group] = scale_R, zero_R
            swept = grid.sweep(
                owed_RC + weight_RC,
                weight_RC,
                factor.matrix_II[columns, columns],
                scale_R=scale_R,
                zero_R=zero_R,
                level_RL=grid.levels(scale_R, zero_R),
            )
            code_RI[:, columns] = swept.code_RC
            error_RI[:, columns] = swept.error_RC
            if measured:
                loss_R += swept.residual_RC.square() @ factor.scale_I[columns]
    return SweptTile(
        code_RI=code_RI,
        error_RI=error_RI,
        scale_RG=scale_RG,
        zero_RG=zero_RG,
        loss_R=loss_R,
    )


def round_tile(
    weight_RI: Tensor, scale_RG: Tensor, zero_RG: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Round plainly, to scales that are given; gives codes and errors.

    Some columns at a time: on a GPU each step of it is a copy of them.
    """
    (rows, inputs), groups = weight_RI.shape, scale_RG.shape[1]
    code_RI = empty(rows, inputs, weight_RI, torch.uint8)
    error_RI = torch.empty_like(weight_RI)
    size = inputs // groups if groups > 1 else _COLUMNS
    for start in range(0, inputs, size):
        columns = slice(start, start + size)
        group = start // size if groups > 1 else 0
        scale_R, zero_R = scale_RG[:, group], zero_RG[:, group]
        level_RL = grid.levels(scale_R, zero_R)
        code_RI[:, columns], error_RI[:, columns] = grid.round(
            weight_RI[:, columns], scale_R, zero_R, level_RL
        )
    return code_RI, error_RI


def group_inverses(factor: Factor, group_size: int) -> Float[Tensor, "G C C"]:
    """Invert U's own blocks of the groups.

    With them a search finds the best continuous values of a group, all earlier errors
    made up for. These are the weights that GPTQ has in place when it reaches the
    group; the sweep's targets leave out what the group's own columns will add:
    w + (E U)[:, group] U[group, group]^-1.
    """
    starts = range(0, factor.matrix_II.shape[0], group_size)
    unit_GCC = torch.stack(
        [factor.matrix_II[at : at + group_size, at : at + group_size] for at in starts]
    )
    eye_CC = torch.eye(group_size).to(unit_GCC)
    inverse_GCC: Tensor = torch.linalg.solve_triangular(
        unit_GCC, eye_CC.expand_as(unit_GCC), upper=True, unitriangular=True
    )
    return inverse_GCC
