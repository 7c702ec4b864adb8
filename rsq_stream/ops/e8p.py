"""Faces of the E8P loops: on a CPU the compiled ones, elsewhere their plain twins.

Codes are digits of ``e8p_codebook.py``, one a weight, each run of 8 a codeword; a scale
a row. ``level_RL`` is what each digit decodes to, rounded as it will be when loaded.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rsq_stream.ops.column_sweep import Swept
from rsq_stream.ops.cuda.cubin_cache import Kernel
from rsq_stream.ops.cuda.launch import by_rows, launch, output
from rsq_stream.ops.e8p_codebook import DIGITS, WIDTH, digit_values, halves, patterns
from rsq_stream.ops.e8p_loops import descend_rows, round_rows, row_errors, sweep_rows

Round = Callable[[Tensor, Tensor], Tensor]
"""What rounds vectors to codewords: a twin, or the kernel."""
_THREADS = 128
_CHUNK = 4096
"""Vectors that the plain search has in hand at a time."""


def round_lattice(
    target_RC: Float[Tensor, "R C"], scale_R: Float[Tensor, "R"]
) -> UInt8[Tensor, "R C"]:
    """Return the digits of the codewords nearest to target / scale."""
    if target_RC.is_cuda:
        return round_lattice_kernel(target_RC, scale_R)
    digit_RC = torch.empty(target_RC.shape, dtype=torch.uint8)
    round_rows(
        target_RC.contiguous().numpy(),
        (1.0 / scale_R).numpy(),
        halves(),
        digit_RC.numpy(),
    )
    return digit_RC


def round_lattice_kernel(
    target_RC: Float[Tensor, "R C"], scale_R: Float[Tensor, "R"]
) -> UInt8[Tensor, "R C"]:
    """Do the same with ``kernels/e8p.cu``."""
    rows, columns = target_RC.shape
    target_RC = by_rows(target_RC)
    half_P3 = torch.from_numpy(halves()).to(target_RC.device)
    digit_RC = output((rows, columns), torch.uint8, target_RC.device)
    launch(
        Kernel("e8p", "lattice"),
        (-(-rows * (columns // WIDTH) // _THREADS), 1, 1),
        _THREADS,
        (
            *(target_RC, target_RC.stride(0)),
            *(scale_R.contiguous(), half_P3, digit_RC),
            *(rows, columns, len(half_P3)),
        ),
    )
    return digit_RC


def round_lattice_naive(
    target_RC: Float[Tensor, "R C"], scale_R: Float[Tensor, "R"]
) -> UInt8[Tensor, "R C"]:
    """Do the same by trying all patterns, on any device."""
    x_NC = (target_RC * (1.0 / scale_R)[:, None]).reshape(-1, WIDTH)
    digits = [_searched(part_NC) for part_NC in x_NC.split(_CHUNK)]
    return torch.cat(digits).view(target_RC.shape)


def _searched(x_NC: Tensor) -> Tensor:
    """Find the nearest codewords: all patterns, the sign to give up where it is odd."""
    pattern_PC = torch.from_numpy(patterns()).to(x_NC)
    odd_P = pattern_PC.sum(1).long() & 1
    best_N = torch.full_like(x_NC[:, 0], torch.inf)
    found_NC = torch.zeros_like(x_NC)
    for shift in (0.25, -0.25):
        u_NC = x_NC - shift
        cost_NPC = u_NC.abs()[:, None, :] * pattern_PC
        wrong_NP = ((u_NC < 0).sum(1)[:, None] & 1) != odd_P
        score_NP = 2 * cost_NPC.sum(2) - pattern_PC.square().sum(1)
        score_NP = score_NP - torch.where(wrong_NP, 4 * cost_NPC.amin(2), 0.0)
        chosen_N1 = score_NP.argmax(1, keepdim=True)
        distance_N = u_NC.square().sum(1) - score_NP.gather(1, chosen_N1)[:, 0]
        vector_NC = torch.copysign(pattern_PC[chosen_N1[:, 0]], u_NC)
        vector_NC = torch.where((vector_NC < 0) == (u_NC < 0), vector_NC, -vector_NC)
        flip_N1 = (u_NC.abs() * vector_NC.abs()).argmin(1, keepdim=True)
        turned_NC = vector_NC.scatter(1, flip_N1, -vector_NC.gather(1, flip_N1))
        wrong_N1 = wrong_NP.gather(1, chosen_N1)
        vector_NC = torch.where(wrong_N1, turned_NC, vector_NC) + shift
        nearer_N = distance_N < best_N
        found_NC = torch.where(nearer_N[:, None], vector_NC, found_NC)
        best_N = torch.where(nearer_N, distance_N, best_N)
    return (2 * found_NC + (DIGITS - 1) / 2).round().to(torch.uint8)


def rounding_errors(
    target_RC: Float[Tensor, "R C"], scale_RP: Float[Tensor, "R P"]
) -> Float[Tensor, "R P"]:
    """Sum each row's squared errors of rounding, for each candidate scale."""
    if target_RC.is_cuda:
        return rounding_errors_naive(target_RC, scale_RP, round_lattice)
    error_RP = torch.empty_like(scale_RP, memory_format=torch.contiguous_format)
    row_errors(
        target_RC.contiguous().numpy(),
        scale_RP.contiguous().numpy(),
        halves(),
        error_RP.numpy(),
    )
    return error_RP


def rounding_errors_naive(
    target_RC: Float[Tensor, "R C"],
    scale_RP: Float[Tensor, "R P"],
    rounded: Round = round_lattice_naive,
) -> Float[Tensor, "R P"]:
    """Do the same, candidate by candidate, on any device."""
    value_L = digit_values().to(target_RC)
    errors = []
    for scale_R in scale_RP.T:
        digit_RC = rounded(target_RC, scale_R)
        error_RC = target_RC - value_L[digit_RC.long()] * scale_R[:, None]
        errors.append(error_RC.square().sum(1))
    return torch.stack(errors, dim=1)


def sweep_lattice(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> Swept:
    """Quantize a block of columns, 8 by 8; codes are digits.

    With U_b the own tile of 8 columns, the loss of their errors e is that of
    (e + owed U_b^-1) U_b, so the weights plus owed U_b^-1 are rounded: what the errors
    so far, (target - weight), leave to be made up for.
    """
    unit_BCC = _unit_inverses(upper_CC)
    if target_RC.is_cuda:
        return sweep_lattice_naive(
            target_RC,
            weight_RC,
            upper_CC,
            scale_R=scale_R,
            level_RL=level_RL,
            unit_BCC=unit_BCC,
            rounded=round_lattice,
        )
    owed_RC = (target_RC - weight_RC).contiguous()
    digit_RC = torch.empty(target_RC.shape, dtype=torch.uint8)
    error_RC = torch.empty(target_RC.shape, dtype=torch.float32)
    sweep_rows(
        owed_RC.numpy(),
        weight_RC.contiguous().numpy(),
        upper_CC.contiguous().numpy(),
        unit_BCC.numpy(),
        (1.0 / scale_R).numpy(),
        level_RL.contiguous().numpy(),
        halves(),
        digit_RC.numpy(),
        error_RC.numpy(),
    )
    return Swept(digit_RC, error_RC, owed_RC.add_(error_RC))


def sweep_lattice_naive(
    target_RC: Float[Tensor, "R C"],
    weight_RC: Float[Tensor, "R C"],
    upper_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
    unit_BCC: Tensor,
    rounded: Round = round_lattice_naive,
) -> Swept:
    """Do the same block by block, all rows at once, on any device."""
    owed_RC = target_RC - weight_RC
    digit_RC = torch.empty(target_RC.shape, dtype=torch.uint8, device=target_RC.device)
    error_RC = torch.empty_like(target_RC)
    for number, unit_CC in enumerate(unit_BCC):
        end = WIDTH * (number + 1)
        own = slice(end - WIDTH, end)
        best_RC = weight_RC[:, own] + owed_RC[:, own] @ unit_CC
        digit_RC[:, own] = rounded(best_RC, scale_R)
        error_RC[:, own] = weight_RC[:, own] - level_RL.gather(
            1, digit_RC[:, own].long()
        )
        owed_RC[:, own] += error_RC[:, own] @ upper_CC[own, own].triu(1)
        owed_RC[:, end:] += error_RC[:, own] @ upper_CC[own, end:]
    return Swept(digit_RC, error_RC, owed_RC + error_RC)


def _unit_inverses(upper_CC: Tensor) -> Tensor:
    """Invert the 8 x 8 unit upper triangular tiles on the diagonal."""
    tile_BCC = _tiles(upper_CC).triu(1)
    eye_CC = torch.eye(WIDTH).to(upper_CC)
    inverse: Tensor = torch.linalg.solve_triangular(
        tile_BCC + eye_CC, eye_CC.expand_as(tile_BCC), upper=True, unitriangular=True
    )
    return inverse.contiguous()


def _tiles(matrix_CC: Tensor) -> Tensor:
    """Return the 8 x 8 tiles on the diagonal, ``[blocks, 8, 8]``."""
    blocks = matrix_CC.shape[0] // WIDTH
    tile_BCBC = matrix_CC.reshape(blocks, WIDTH, blocks, WIDTH)
    return tile_BCBC.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def descend_lattice(
    digit_RC: UInt8[Tensor, "R C"],
    pull_RC: Float[Tensor, "R C"],
    hessian_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
) -> UInt8[Tensor, "R C"]:
    """Compute better digits, 8 columns at a time, left to right.

    With e = w - level[digit] and P = e H (``pull_RC``), a block's minimiser is
    level + P_b H_bb^-1. The codeword nearest to it is taken where the loss falls:
    2 step P_b > step H_bb step.
    """
    solved_BCC = torch.linalg.inv(_tiles(hessian_CC).double()).float().contiguous()
    if digit_RC.is_cuda:
        return descend_lattice_naive(
            digit_RC,
            pull_RC,
            hessian_CC,
            scale_R=scale_R,
            level_RL=level_RL,
            solved_BCC=solved_BCC,
            rounded=round_lattice,
        )
    made_RC = digit_RC.contiguous().clone()
    descend_rows(
        made_RC.numpy(),
        pull_RC.contiguous().numpy().copy(),
        hessian_CC.contiguous().numpy(),
        solved_BCC.numpy(),
        (1.0 / scale_R).numpy(),
        level_RL.contiguous().numpy(),
        halves(),
    )
    return made_RC


def descend_lattice_naive(
    digit_RC: UInt8[Tensor, "R C"],
    pull_RC: Float[Tensor, "R C"],
    hessian_CC: Float[Tensor, "C C"],
    scale_R: Float[Tensor, "R"],
    level_RL: Float[Tensor, "R L"],
    solved_BCC: Tensor,
    rounded: Round = round_lattice_naive,
) -> UInt8[Tensor, "R C"]:
    """Do the same block by block, all rows at once, on any device."""
    digit_RC, pull_RC = digit_RC.clone(), pull_RC.clone()
    for number, solved_CC in enumerate(solved_BCC):
        end = WIDTH * (number + 1)
        own = slice(end - WIDTH, end)
        before_RC = level_RL.gather(1, digit_RC[:, own].long())
        best_RC = before_RC + pull_RC[:, own] @ solved_CC
        moved_RC = rounded(best_RC, scale_R)
        step_RC = level_RL.gather(1, moved_RC.long()) - before_RC
        bent_RC = step_RC @ hessian_CC[own, own]
        better_R1 = (step_RC * (2 * pull_RC[:, own] - bent_RC)).sum(1)[:, None] > 0
        digit_RC[:, own] = torch.where(better_R1, moved_RC, digit_RC[:, own])
        step_RC = torch.where(better_R1, step_RC, 0.0)
        pull_RC[:, end:] -= step_RC @ hessian_CC[own, end:]
    return digit_RC
