"""GPTQ in its LDL form: one factorisation, no inverse, in place.

With H + lambda I = U D U^T the loss of errors E = W - Q is
tr(E (H + lambda I) E^T) = sum over k of d_k (e_k + sum_{j<k} e_j U[j, k])^2, so
the best code for column k, earlier ones given, rounds
w_k + sum_{j<k} e_j U[j, k]. In exact arithmetic that is GPTQ (Frantar et al.
2022); the form without inverse is that of QuIP (Chee et al. 2023, LDLQ).

Rows are independent: a tile of rows goes through all columns by itself
(``row_tile.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rsq_stream.algorithm.gptq.ldl import Factor
from rsq_stream.algorithm.gptq.loss import lost_share
from rsq_stream.algorithm.gptq.row_tile import (
    Tile,
    group_inverses,
    round_tile,
    solve_tile,
)
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.errors import NumericalError
from rsq_stream.runtime.worker_pool import Pool

DECODED = 1 << 24
"""Codes that are decoded at a time (packing takes fewer)."""
Target = Callable[[Tensor, slice], Tensor]
"""Gives what some rows ``[R, I]`` of the weights are to become, from these rows."""


@dataclass(frozen=True, kw_only=True)
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
    target: Target | None = None,
) -> Solution:
    """Quantize a linear against the Hessian that ``factor`` holds.

    ``group_size`` divides I, or is -1 for one scale a row. With
    ``dynamic_scales`` a group's scale is searched on the targets, when the sweep
    reaches it; otherwise on the weights. ``sweeps`` passes of coordinate descent and
    a ``refit`` of the scales follow (``refine.py``). Where the loss exceeds that of
    rounding with the same scales, the rounded codes are kept.

    The weights may lie in host memory: tile by tile they go to where the factor is.
    There ``target`` makes of them what is solved; else they are solved themselves.

    Raises
    ------
    NumericalError
        What is solved holds NaN or infinity.
    """
    device = factor.matrix_II.device
    dynamic = dynamic_scales and group_size != -1
    inverse_GCC = group_inverses(factor, group_size) if dynamic else None

    code_OI = torch.empty(weight_OI.shape, dtype=torch.uint8, device=device)
    starts = range(0, len(weight_OI), tile_rows)

    def target_of(rows: slice) -> Tensor:
        weight_RI = weight_OI[rows].to(device)
        return weight_RI if target is None else target(weight_RI, rows)

    def solve_one(start: int) -> Tile:
        rows = slice(start, start + tile_rows)
        code_RI = code_OI[rows]
        tile = solve_tile(
            target_of(rows),
            factor=factor,
            grid=grid,
            group_size=group_size,
            inverse_GCC=inverse_GCC,
            sweeps=sweeps,
            refit=refit,
        )
        code_RI.copy_(tile.code_RI)
        return replace(tile, code_RI=code_RI)

    tiles = pool.map(solve_one, starts)
    losses_3 = torch.stack([tile.losses for tile in tiles]).sum(0)
    solved, rounded, energy = losses_3.tolist()
    if not isfinite(solved + rounded + energy):
        raise NumericalError(
            "its weights, or what error propagation makes of them, hold NaN or infinity"
        )
    scale_OG = torch.cat([tile.scale_RG for tile in tiles])
    zero_OG = torch.cat([tile.zero_RG for tile in tiles])
    kept_rounding = solved > rounded
    if kept_rounding:

        def round_one(given: tuple[int, Tile]) -> None:
            start, tile = given
            target_RI = target_of(slice(start, start + tile_rows))
            code_RI, _ = round_tile(target_RI, tile.scale_RG, tile.zero_RG, grid)
            tile.code_RI.copy_(code_RI)

        pool.map(round_one, zip(starts, tiles, strict=True))
    best = rounded if kept_rounding else solved
    return Solution(
        code_OI=code_OI,
        scale_OG=scale_OG,
        zero_OG=zero_OG,
        relative_error=lost_share(best, energy),
        rounding_error=lost_share(rounded, energy),
        kept_rounding=kept_rounding,
    )


def decoded(
    solution: Solution, grid: Grid, kind: torch.dtype = torch.float32
) -> Tensor:
    """Return the weights as a loader sees them, in a type that holds them exactly."""
    parts = (solution.code_OI, solution.scale_OG, solution.zero_OG)
    rows = max(1, DECODED // solution.code_OI.shape[1])
    made_OI = torch.empty_like(solution.code_OI, dtype=kind)
    by_rows = zip(*(part.split(rows) for part in (*parts, made_OI)), strict=True)
    for code_RI, scale_RG, zero_RG, made_RI in by_rows:
        made_RI.copy_(grid.decode(code_RI, scale_RG, zero_RG))
    return made_OI
