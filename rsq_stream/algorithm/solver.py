"""GPTQ in its LDL form: one factorisation, no inverse, in place.

With H + lambda I = U D U^T the loss of errors E = W - Q is
tr(E (H + lambda I) E^T) = sum over k of d_k (e_k + sum_{j<k} e_j U[j, k])^2, so
the best code for column k, earlier ones given, rounds
w_k + sum_{j<k} e_j U[j, k]. In exact arithmetic that is GPTQ (Frantar et al.
2022); the form without inverse is that of QuIP (Chee et al. 2023, LDLQ).

Rows are independent, so a tile of rows goes through all columns by itself:
per block of columns one product with the errors so far, then the sweep.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rsq_stream.algorithm.factor import Factor
from rsq_stream.algorithm.grid import Grid, decode
from rsq_stream.algorithm.polish import Polish
from rsq_stream.ops.pool import Pool
from rsq_stream.ops.sweep import sweep


@dataclass(frozen=True)
class Solution:
    """The codes of one linear and how well they do."""

    code_OI: UInt8[Tensor, "O I"]
    scale_OG: Float[Tensor, "O G"]
    zero_OG: Float[Tensor, "O G"]
    relative_error: float
    """tr(E H E^T) / tr(W H W^T), H undamped; H = I without calibration."""
    rounding_error: float
    """The same for rounding to nearest with the same scales."""
    kept_rounding: bool


@dataclass
class _Tile:
    """What one tile of rows came to."""

    code_RI: Tensor
    nearest_RI: Tensor
    scale_RG: Tensor
    zero_RG: Tensor
    losses: Tensor
    """fp64: the solver's loss, rounding's, and the energy tr(W H W^T)."""


def solve(
    weight_OI: Float[Tensor, "O I"],
    factor: Factor,
    grid: Grid,
    group_size: int,
    *,
    dynamic_scales: bool,
    tile_rows: int,
    pool: Pool,
    sweeps: int = 0,
    refit: bool = False,
) -> Solution:
    """Quantize a linear against the Hessian that ``factor`` holds.

    ``group_size`` divides I, or is -1 for one scale a row. With
    ``dynamic_scales`` a group's scale is searched on the targets, when the sweep
    reaches it; otherwise on the weights. ``sweeps`` passes of coordinate descent and
    a ``refit`` of the scales follow (``polish.py``). Where the loss exceeds that of
    rounding with the same scales, the rounded codes are kept.
    """
    solve_tile = partial(
        _solve_tile,
        factor=factor,
        grid=grid,
        group_size=group_size,
        dynamic_scales=dynamic_scales,
        sweeps=sweeps,
        refit=refit,
    )
    tiles = pool.map(solve_tile, weight_OI.split(tile_rows))
    solved, rounded, energy = torch.stack([tile.losses for tile in tiles]).sum(0)
    kept_rounding = bool(solved > rounded)
    codes = [tile.nearest_RI if kept_rounding else tile.code_RI for tile in tiles]
    best = rounded if kept_rounding else solved
    return Solution(
        code_OI=torch.cat(codes),
        scale_OG=torch.cat([tile.scale_RG for tile in tiles]),
        zero_OG=torch.cat([tile.zero_RG for tile in tiles]),
        relative_error=_share(best, energy),
        rounding_error=_share(rounded, energy),
        kept_rounding=kept_rounding,
    )


def round_to_nearest(
    weight_OI: Float[Tensor, "O I"],
    grid: Grid,
    group_size: int,
    tile_rows: int,
    pool: Pool,
) -> Solution:
    """Quantize a linear by rounding alone: method ``rtn``."""
    inputs = weight_OI.shape[1]
    columns = inputs if group_size == -1 else group_size

    def one(weight_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight_LC = weight_RI.reshape(-1, columns)
        scale_L, zero_L = grid.search(weight_LC)
        code_LC = grid.nearest(weight_LC, scale_L, zero_L).to(torch.uint8)
        shape = (weight_RI.shape[0], -1)
        return code_LC.reshape(shape), scale_L.reshape(shape), zero_L.reshape(shape)

    parts = pool.map(one, weight_OI.split(tile_rows))
    code_OI, scale_OG, zero_OG = (torch.cat(part) for part in zip(*parts, strict=True))
    error_OI = weight_OI - decode(code_OI, scale_OG, zero_OG, grid.storage_type)
    error = _share(error_OI.double().square().sum(), weight_OI.double().square().sum())
    return Solution(code_OI, scale_OG, zero_OG, error, error, kept_rounding=False)


def _solve_tile(
    weight_RI: Tensor,
    *,
    factor: Factor,
    grid: Grid,
    group_size: int,
    dynamic_scales: bool,
    sweeps: int,
    refit: bool,
) -> _Tile:
    rows, inputs = weight_RI.shape
    block = factor.tiles[0].shape[0] if group_size == -1 else group_size
    groups = 1 if group_size == -1 else inputs // group_size
    error_RI = torch.empty_like(weight_RI)
    nearest_error_RI = torch.empty_like(weight_RI)
    code_RI = torch.empty(rows, inputs, dtype=torch.uint8, device=weight_RI.device)
    nearest_RI = torch.empty_like(code_RI)
    scale_RG = weight_RI.new_empty(rows, groups)
    zero_RG = weight_RI.new_empty(rows, groups)
    for start in range(0, inputs, block):
        columns = slice(start, min(start + block, inputs))
        weight_RC = weight_RI[:, columns]
        target_RC = torch.addmm(
            weight_RC, error_RI[:, :start], factor.matrix_II[:start, columns]
        )
        group = 0 if group_size == -1 else start // block
        if group_size != -1:
            unit_CC = factor.matrix_II[columns, columns]
            searched_RC = (
                _current(weight_RC, target_RC, unit_CC) if dynamic_scales else weight_RC
            )
            scale_RG[:, group], zero_RG[:, group] = grid.search(searched_RC)
        elif start == 0:
            scale_RG[:, 0], zero_RG[:, 0] = grid.search(weight_RI)
        scale_R, zero_R = scale_RG[:, group].clone(), zero_RG[:, group].clone()
        level_RL = grid.levels(scale_R, zero_R)
        code_RI[:, columns], error_RI[:, columns] = sweep(
            target_RC,
            weight_RC,
            factor.matrix_II[columns, columns],
            scale_R,
            zero_R,
            level_RL,
        )
        nearest_RC = grid.nearest(weight_RC, scale_R, zero_R)
        nearest_RI[:, columns] = nearest_RC
        nearest_error_RI[:, columns] = weight_RC - level_RL.gather(1, nearest_RC.long())
    if sweeps or refit:
        polish = Polish(
            weight_RI, code_RI, scale_RG, zero_RG, error_RI, factor, grid, group_size
        )
        polish.run(sweeps, refit=refit)
        # Rounding is compared with the scales that are kept.
        nearest_RI, nearest_error_RI = _rounded(weight_RI, scale_RG, zero_RG, grid)
    losses = [
        weighted_loss(part_RI, factor)
        for part_RI in (error_RI, nearest_error_RI, weight_RI)
    ]
    return _Tile(code_RI, nearest_RI, scale_RG, zero_RG, torch.stack(losses))


def _rounded(
    weight_RI: Tensor, scale_RG: Tensor, zero_RG: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Give the codes of plain rounding with given scales, and their errors."""
    scale_RI, zero_RI = (
        part_RG.repeat_interleave(weight_RI.shape[1] // part_RG.shape[1], dim=1)
        for part_RG in (scale_RG, zero_RG)
    )
    code_RI = (torch.round(weight_RI / scale_RI) + zero_RI).clamp(0, grid.top)
    error_RI = weight_RI - grid.rounded((code_RI - zero_RI) * scale_RI)
    return code_RI.to(torch.uint8), error_RI


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


def weighted_loss(error_RI: Float[Tensor, "R I"], factor: Factor) -> Tensor:
    """Compute tr(E H E^T) in fp64 sums, H undamped, from the lower triangle."""
    total = torch.zeros((), dtype=torch.float64, device=error_RI.device)
    start = 0
    for tile_CC in factor.tiles:
        end = start + tile_CC.shape[0]
        error_RC = error_RI[:, start:end]
        below_RC = error_RI[:, end:] @ factor.matrix_II[end:, start:end]
        product_RC = error_RC @ tile_CC + 2 * below_RC
        total += (error_RC * product_RC).sum(dtype=torch.float64)
        start = end
    return total


def _share(loss: Tensor, energy: Tensor) -> float:
    """Give loss / energy, 0 where there is no energy to lose."""
    return float(loss / energy) if float(energy) > 0 else 0.0
