"""H + lambda I = U D U^T in place, U unit upper triangular.

With it tr(E H E^T) = || E U D^(1/2) ||^2, so a column is quantized against
w_k + sum over j < k of (w_j - q_j) U[j, k]: GPTQ without an inverse (the LDL
form of QuIP; the derivation is in ``solver.py``). Blocked, right-looking, from
the last tile upward: tile Cholesky, triangular solve, product. Tiles and order
are fixed by the plan, so workers share tiles without changing a bit.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.hessian import Hessian
from rsq_stream.errors import NumericalError
from rsq_stream.ops.cholesky import factor_tile
from rsq_stream.ops.pool import Pool

_ATTEMPTS = 8
_GROWTH = 10.0


@dataclass
class Factor:
    """The factor and the Hessian in one square matrix."""

    matrix_II: Float[Tensor, "I I"]
    """Above the diagonal U, below the tiles on the diagonal H."""
    tiles: list[Tensor]  # each [C, C]; the last may be smaller
    """H's own tiles on the diagonal, undamped and whole."""
    scale_I: Float[Tensor, "I"]
    """D: what an error of 1 in a column costs once later columns made up for it."""
    damping: float
    """lambda, as a share of H's mean diagonal."""
    attempts: int
    dead_inputs: int
    damp: float
    """lambda itself."""

    def hessian_rows(self, start: int, end: int) -> Float[Tensor, "C I"]:
        """Give rows of H + lambda I, from the half and the tiles that keep H."""
        inputs, tile = self.matrix_II.shape[0], self.tiles[0].shape[0]
        rows_CI = self.matrix_II.new_empty(end - start, inputs)
        for at in range(start - start % tile, end, tile):
            rows = slice(max(start, at), min(end, at + tile))
            mine = slice(rows.start - start, rows.stop - start)
            after = min(at + tile, inputs)
            inside = slice(rows.start - at, rows.stop - at)
            rows_CI[mine, :at] = self.matrix_II[rows, :at]
            rows_CI[mine, at:after] = self.tiles[at // tile][inside]
            rows_CI[mine, after:] = self.matrix_II[after:, rows].T
        rows_CI[:, start:end].diagonal().add_(self.damp)
        return rows_CI


def factorise(hessian: Hessian, damping: float, tile: int, pool: Pool) -> Factor:
    """Factor H in place; where it is not positive definite, damp more and retry.

    Each retry starts from the H that the lower triangle keeps, with ten times
    the damping. A Hessian of zeros only becomes the identity.

    Raises
    ------
    NumericalError
        H holds NaN or infinity, or no damping up to 10**5 times the mean
        diagonal makes it positive definite.
    """
    matrix_II = hessian.matrix_II
    diagonal_I = matrix_II.diagonal().clone()
    mean = float(diagonal_I.double().mean())
    if not 0 <= mean < float("inf"):
        raise NumericalError("the Hessian holds NaN or infinity on its diagonal")
    tiles = _keep_hessian(matrix_II, tile)
    share = damping
    for attempt in range(1, _ATTEMPTS + 1):
        if attempt > 1:
            _restore_hessian(matrix_II, tiles)
            share *= _GROWTH
        damp = share * mean if mean > 0 else 1.0
        matrix_II.diagonal().copy_(diagonal_I + damp)
        scale_I = _factor_upper(matrix_II, tile, pool)
        if scale_I is not None:
            return Factor(
                matrix_II=matrix_II,
                tiles=tiles,
                scale_I=scale_I,
                damping=share,
                attempts=attempt,
                dead_inputs=int((diagonal_I == 0).sum()),
                damp=damp,
            )
    raise NumericalError(
        f"the Hessian is not positive definite even with {share:g} times its mean"
        " diagonal added; the activations hold values that cannot be right"
    )


def _keep_hessian(matrix_II: Tensor, tile: int) -> list[Tensor]:
    """Copy the upper triangle below the diagonal tiles, and those tiles aside."""
    tiles = []
    for start in range(0, matrix_II.shape[0], tile):
        rows = slice(start, start + tile)
        upper_CC = matrix_II[rows, rows].triu()
        tiles.append(upper_CC + upper_CC.triu(1).T)
        matrix_II[rows, :start] = matrix_II[:start, rows].T
    return tiles


def _restore_hessian(matrix_II: Tensor, tiles: list[Tensor]) -> None:
    """Bring H back into the upper triangle after a failed factorisation."""
    start = 0
    for tile_CC in tiles:
        rows = slice(start, start + tile_CC.shape[0])
        matrix_II[rows, rows] = tile_CC
        matrix_II[:start, rows] = matrix_II[rows, :start].T
        start = rows.stop


def _factor_upper(matrix_II: Tensor, tile: int, pool: Pool) -> Tensor | None:
    """Turn the upper triangle into U and return D; None if H is not p.d.

    On a GPU the one look at the verdict comes last: after a tile that failed, NaN may
    spread, but only above the diagonal tiles and within them. What H is restored from
    is neither.
    """
    size, looks = matrix_II.shape[0], _looks_at_each_tile(matrix_II)
    scale_I = torch.empty_like(matrix_II.diagonal())
    failed = torch.zeros((), dtype=torch.bool, device=matrix_II.device)
    for start in reversed(range(0, size, tile)):
        tile_CC = matrix_II[start : start + tile, start : start + tile]
        failed |= factor_tile(tile_CC) >= 0
        root_C = tile_CC.diagonal().clone()
        failed |= ~torch.isfinite(root_C).all()
        if looks and bool(failed):
            return None
        panel_IC = matrix_II[:start, start : start + tile]
        before = [slice(row, row + tile) for row in range(0, start, tile)]
        pool.map(partial(_solve_panel, panel_IC, tile_CC), before)
        pool.map(partial(_update, matrix_II, panel_IC), before)
        # R = U D^(1/2): divide each column by its diagonal entry.
        panel_IC /= root_C
        tile_CC /= root_C
        scale_I[start : start + tile] = root_C.square()
    return None if bool(failed) else scale_I


def _looks_at_each_tile(matrix_II: Tensor) -> bool:
    """Whether to stop at the first bad tile; for a GPU each look is a wait."""
    return not matrix_II.is_cuda


def _solve_panel(panel_IC: Tensor, tile_CC: Tensor, rows: slice) -> None:
    """Solve X R^T = A for one tile of the panel above a factored tile."""
    panel_IC[rows] = torch.linalg.solve_triangular(
        tile_CC.triu().T, panel_IC[rows], upper=False, left=False
    )


def _update(matrix_II: Tensor, panel_IC: Tensor, columns: slice) -> None:
    """Subtract the panel's part from one column of tiles, diagonal tile included."""
    matrix_II[: columns.stop, columns].addmm_(
        panel_IC[: columns.stop], panel_IC[columns].T, alpha=-1
    )
