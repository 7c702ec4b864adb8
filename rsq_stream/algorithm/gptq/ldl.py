"""H + lambda I = U D U^T in place, U unit upper triangular.

With it tr(E H E^T) = || E U D^(1/2) ||^2, so a column is quantized against
w_k + sum over j < k of (w_j - q_j) U[j, k]: GPTQ without an inverse (the LDL
form of QuIP; the derivation is in ``solver.py``). Blocked, right-looking, from
the last block upward: Cholesky of the block, triangular solve, product. Blocks and
order are fixed by the plan, so workers share them without changing a bit.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.errors import NumericalError
from rsq_stream.ops.column_layout import product
from rsq_stream.runtime.worker_pool import Pool

_WIDE = 512
"""Columns that are worked on together: products of fewer are bound by memory."""
_ATTEMPTS = 8
_GROWTH = 10.0


@dataclass(kw_only=True)
class Factor:
    """The factor and the Hessian in one square matrix."""

    matrix_II: Float[Tensor, "I I"]
    """Above the diagonal U, below the blocks on the diagonal H."""
    blocks: list[Tensor]  # each [W, W]; the last may be smaller
    """H's own blocks on the diagonal, some tiles wide, undamped and whole."""
    tile: int
    """Columns of a tile."""
    scale_I: Float[Tensor, "I"]
    """D: what an error of 1 in a column costs once later columns made up for it."""
    damping: float
    """lambda, as a share of H's mean diagonal."""
    attempts: int
    dead_inputs: int
    damp: float
    """lambda itself."""

    def hessian_block(self, start: int, end: int) -> Float[Tensor, "W W"]:
        """Return H + lambda I of some rows and columns, from the half that keeps H.

        ``start`` and ``end`` are at ends of blocks.
        """
        wide = self.blocks[0].shape[0]
        block_WW = torch.empty_like(self.matrix_II[start:end, start:end])
        for at in range(0, end - start, wide):
            own, before = slice(at, at + wide), slice(0, at)
            block_WW[own, own] = self.blocks[(start + at) // wide]
            block_WW[own, before] = self.matrix_II[start:end, start:end][own, before]
            block_WW[before, own] = block_WW[own, before].T
        block_WW.diagonal().add_(self.damp)
        return block_WW

    def gradients(
        self, error_RI: Float[Tensor, "R I"], start: int, end: int
    ) -> tuple[Float[Tensor, "R W"], Float[Tensor, "W W"]]:
        """Compute some columns of E (H + lambda I), and H + lambda I among them."""
        wide, inputs = self.blocks[0].shape[0], self.matrix_II.shape[0]
        first = start - start % wide
        last = min(-(-end // wide) * wide, inputs)
        own = slice(start - first, end - first)
        around_WW = self.hessian_block(first, last)
        pull_RW = product(error_RI[:, first:last], around_WW[:, own])
        pull_RW.addmm_(error_RI[:, :first], self.matrix_II[start:end, :first].T)
        pull_RW.addmm_(error_RI[:, last:], self.matrix_II[last:, start:end])
        return pull_RW, around_WW[own, own]


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
    blocks = _keep_hessian(matrix_II, tile, pool)
    share = damping
    for attempt in range(1, _ATTEMPTS + 1):
        if attempt > 1:
            _restore_hessian(matrix_II, blocks)
            share *= _GROWTH
        damp = share * mean if mean > 0 else 1.0
        matrix_II.diagonal().copy_(diagonal_I + damp)
        scale_I = _factor_upper(matrix_II, tile, pool)
        if scale_I is not None:
            return Factor(
                matrix_II=matrix_II,
                blocks=blocks,
                tile=tile,
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


def _keep_hessian(matrix_II: Tensor, tile: int, pool: Pool) -> list[Tensor]:
    """Copy the upper triangle below the diagonal blocks, and those blocks aside."""

    def one(run: tuple[int, int]) -> Tensor:
        start, end = run
        rows = slice(start, end)
        for at in range(0, start, tile):
            # By way of a small copy, which is turned in the processor's cache.
            turned_WC = matrix_II[at : at + tile, rows].T.contiguous()
            matrix_II[rows, at : at + tile] = turned_WC
        upper_WW = matrix_II[rows, rows].triu()
        return upper_WW + upper_WW.triu(1).T

    runs = wide_blocks(matrix_II.shape[0], tile)
    return pool.map(one, reversed(runs))[::-1]


def _restore_hessian(matrix_II: Tensor, blocks: list[Tensor]) -> None:
    """Bring H back into the upper triangle after a failed factorisation."""
    start = 0
    for block_WW in blocks:
        rows = slice(start, start + block_WW.shape[0])
        matrix_II[rows, rows] = block_WW
        matrix_II[:start, rows] = matrix_II[rows, :start].T
        start = rows.stop


def wide_blocks(inputs: int, unit: int) -> list[tuple[int, int]]:
    """Cut columns into blocks of some units each, wide enough for fast products."""
    wide = unit * max(1, _WIDE // unit)
    return [(start, min(start + wide, inputs)) for start in range(0, inputs, wide)]


def _factor_upper(matrix_II: Tensor, tile: int, pool: Pool) -> Tensor | None:
    """Turn the upper triangle into U and return D; None if H is not p.d.

    By blocks some tiles wide: what lies left of one is updated once by all of it.

    On a GPU the one look at the verdict comes last: after a block that failed, NaN may
    spread, but only above the diagonal blocks and within them. What H is restored from
    is neither.
    """
    size, looks = matrix_II.shape[0], _looks_at_each_block(matrix_II)
    scale_I = torch.empty_like(matrix_II.diagonal())
    failed = torch.zeros((), dtype=torch.bool, device=matrix_II.device)
    for first, end in reversed(wide_blocks(size, tile)):
        block_WW = matrix_II[first:end, first:end]
        failed |= factor_block(block_WW) >= 0
        failed |= ~torch.isfinite(block_WW.diagonal()).all()
        if looks and bool(failed):
            return None
        panel_IW = matrix_II[:first, first:end]
        runs = [slice(*run) for run in wide_blocks(first, tile)]
        pool.map(partial(_solve_panel, panel_IW, block_WW), runs)
        # The highest columns first: they take the longest.
        columns = [slice(at, at + tile) for at in reversed(range(0, first, tile))]
        pool.map(partial(_update, matrix_II, panel_IW), columns)
        # R = U D^(1/2): divide each column by its diagonal entry.
        root_W = block_WW.diagonal().clone()
        pool.map(partial(_divide, panel_IW, root_W), runs)
        block_WW /= root_W
        scale_I[first:end] = root_W.square()
    return None if bool(failed) else scale_I


def factor_block(block_CC: Float[Tensor, "C C"]) -> Int[Tensor, ""]:
    """Overwrite a symmetric block by R, ``A = R R^T``, with zeros below its diagonal.

    Only the upper triangle is read. It is the library's Cholesky, of the block turned
    end to end. Returns -1, or the index of the first pivot (from the last row upward)
    that is not positive; the block is then spoiled. The answer stays where the block
    is, because whoever looks at it on a GPU waits for it.
    """
    lower_CC, info = torch.linalg.cholesky_ex(block_CC.flip(0, 1))
    block_CC.copy_(lower_CC.flip(0, 1))
    return torch.where(info > 0, block_CC.shape[0] - info, -1)


def _looks_at_each_block(matrix_II: Tensor) -> bool:
    """Whether to stop at the first bad block; for a GPU each look is a wait."""
    return not matrix_II.is_cuda


def _solve_panel(panel_IW: Tensor, root_WW: Tensor, rows: slice) -> None:
    """Solve X R^T = A for some rows of the panel above a factored block."""
    panel_IW[rows] = torch.linalg.solve_triangular(
        root_WW.T, panel_IW[rows], upper=False, left=False
    )


def _divide(panel_IW: Tensor, root_W: Tensor, rows: slice) -> None:
    """Divide some rows of a panel by their columns' diagonal entries."""
    panel_IW[rows] /= root_W


def _update(matrix_II: Tensor, panel_IW: Tensor, columns: slice) -> None:
    """Subtract a panel's part from one column of tiles, diagonal tile included."""
    matrix_II[: columns.stop, columns].addmm_(
        panel_IW[: columns.stop], panel_IW[columns].T, alpha=-1
    )
