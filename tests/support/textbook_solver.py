"""Grids and solvers in float64, as a textbook would write them.

Nothing here is shared with the code that it is compared with. Tensors end in their
axes: Outputs and Inputs of a linear, Groups, Rows, Columns. Codes and zeros are whole
float64.
"""

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

Quantized = namedtuple("Quantized", "codes_OI scale_OG zero_OG decoded_OI")


def clip_search(
    target_RC: Tensor,
    bits: int,
    *,
    symmetric: bool = True,
    signed: bool = True,
    steps: int = 80,
    exponent: float = 2.0,
    storage: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row with the least ``sum |t - decoded| ** e``.

    Each step takes 1 % off the full range; ``signed`` also tries the mirrored grid.
    Of equal errors the upright grid wins, then the larger.
    """
    target_RC = target_RC.double()
    if symmetric:
        full_R = target_RC.abs().amax(1) / (2 ** (bits - 1) - 1)
        full_R = torch.where(full_R == 0, 1.0, full_R)
        zero_R = torch.full_like(full_R, 2 ** (bits - 1))
    else:
        low_R, high_R = target_RC.amin(1).clamp(max=0), target_RC.amax(1).clamp(min=0)
        full_R = (high_R - low_R) / (2**bits - 1)
        full_R = torch.where(full_R == 0, 1.0, full_R)
        zero_R = (-low_R / full_R).round().clamp(0, 2**bits - 1)
    best_R, scale_R = torch.full_like(full_R, torch.inf), full_R
    for sign in (1, -1) if symmetric and signed else (1,):
        for step in range(steps):
            tried_R = sign * _stored(full_R * (1 - 0.01 * step), storage)
            codes_RC = _codes(target_RC, tried_R[:, None], zero_R[:, None], bits)
            decoded_RC = tried_R[:, None] * (codes_RC - zero_R[:, None])
            error_R = ((target_RC - decoded_RC).abs() ** exponent).sum(1)
            scale_R = torch.where(error_R < best_R, tried_R, scale_R)
            best_R = torch.minimum(error_R, best_R)
    return scale_R, zero_R


def _codes(target: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((target / scale).round() + zero).clamp(0, 2**bits - 1)


def _stored(value: Tensor, storage: torch.dtype) -> Tensor:
    return value.to(storage).double()


def _groups(weight_OI: Tensor, group_size: int) -> tuple[Tensor, ...]:
    """Views of the columns that share a grid: all of them if they do not divide."""
    inputs = weight_OI.shape[1]
    divides = group_size != -1 and inputs % group_size == 0
    return torch.split(weight_OI, group_size if divides else inputs, 1)


def rtn(
    weight_OI: Tensor,
    bits: int,
    group_size: int,
    *,
    storage: torch.dtype = torch.float32,
    **search: Any,
) -> Quantized:
    """Round to the nearest level; ``search`` is for `clip_search`, here and below."""
    parts = []
    for group_OC in _groups(weight_OI.double(), group_size):
        grid = clip_search(group_OC, bits, storage=storage, **search)
        scale_O1, zero_O1 = (part_O[:, None] for part_O in grid)
        codes_OC = _codes(group_OC, scale_O1, zero_O1, bits)
        decoded_OC = _stored(scale_O1 * (codes_OC - zero_O1), storage)
        parts.append((codes_OC, scale_O1, zero_O1, decoded_OC))
    return Quantized(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    bits: int,
    group_size: int,
    *,
    damping: float = 0.01,
    dynamic: bool = True,
    storage: torch.dtype = torch.float32,
    **search: Any,
) -> Quantized:
    """GPTQ of Frantar et al. (2210.17323): column by column, no blocks, no order.

    Each column is rounded and its error spread over all later ones. The grid of a
    group is searched on the weights as compensated so far (``dynamic``) or on the
    given ones. An input that never was anything but 0 gets weights of 0.
    """
    given_OI, hessian_II = weight_OI.double(), hessian_II.double().clone()
    weight_OI = given_OI.clone()
    groups = _groups(weight_OI, group_size)
    targets = groups if dynamic and len(groups) > 1 else _groups(given_OI, group_size)

    dead_I = hessian_II.diagonal() == 0
    hessian_II.diagonal()[dead_I] = 1
    weight_OI[:, dead_I] = 0
    hessian_II.diagonal().add_(damping * hessian_II.diagonal().mean())
    upper_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)

    codes, decoded, grids = [], [], []
    for i in range(len(hessian_II)):
        group, column = divmod(i, groups[0].shape[1])
        if column == 0:
            grids.append(clip_search(targets[group], bits, storage=storage, **search))
        scale_O, zero_O = grids[group]
        codes.append(_codes(weight_OI[:, i], scale_O, zero_O, bits))
        decoded.append(_stored(scale_O * (codes[-1] - zero_O), storage))
        error_O = (weight_OI[:, i] - decoded[-1]) / upper_II[i, i]
        weight_OI[:, i + 1 :] -= torch.outer(error_O, upper_II[i, i + 1 :])
    parts = [codes, *zip(*grids, strict=True), decoded]
    return Quantized(*(torch.stack(tuple(part), 1) for part in parts))


def propagated(
    weight_OI: Tensor,
    weights_BT: Tensor,
    inputs: tuple[Tensor, Tensor],
    residuals: tuple[Tensor, Tensor] | None,
    *,
    share: float,
    damping: float,
) -> Tensor:
    """Targets that make up for a share of the error of earlier layers.

    ``inputs`` and ``residuals`` are of the quantized and of the full model:
    G = sum w [W (u_full - u) + (r_full - r)] u^T, W' = W + share G (H + lambda I)^-1.
    """
    u_BTI, full_BTI = (part.double() for part in inputs)
    error_BTO = (full_BTI - u_BTI) @ weight_OI.double().T
    if residuals is not None:
        error_BTO = error_BTO + residuals[1].double() - residuals[0].double()
    drift_OI = torch.einsum("bt,bto,bti->oi", weights_BT.double(), error_BTO, u_BTI)
    hessian_II = torch.einsum("bt,bti,btj->ij", weights_BT.double(), u_BTI, u_BTI)
    hessian_II.diagonal().add_(damping * hessian_II.diagonal().mean())
    target_OI: Tensor = weight_OI + share * drift_OI @ torch.linalg.inv(hessian_II)
    return target_OI


def descent(
    weight_OI: Tensor,
    hessian_II: Tensor,
    found: Quantized,
    bits: int,
    *,
    refit: bool,
    damping: float,
    storage: torch.dtype = torch.float32,
) -> Quantized:
    """One pass of coordinate descent, each group's scales refitted before it."""
    hessian_II = hessian_II.double().clone()
    hessian_II.diagonal().add_(damping * hessian_II.diagonal().mean())
    codes_OI, scale_OG, zero_OG, decoded_OI = (part.clone() for part in found)
    size = codes_OI.shape[1] // scale_OG.shape[1]
    for group in range(scale_OG.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        if refit:
            steps_OC = codes_OI[:, columns] - zero_OG[:, group, None]
            pull_OC = ((weight_OI - decoded_OI) @ hessian_II)[:, columns]
            energy_O = (steps_OC @ hessian_II[columns, columns] * steps_OC).sum(1)
            gain_O = (steps_OC * pull_OC).sum(1)
            wanted_O = _stored(scale_OG[:, group] + gain_O / energy_O, storage)
            move_O = wanted_O - scale_OG[:, group]
            better_O = (2 * gain_O - move_O * energy_O) * move_O > 0
            better_O &= wanted_O * scale_OG[:, group] > 0
            scale_OG[:, group] = torch.where(better_O, wanted_O, scale_OG[:, group])
            decoded_OI[:, columns] = _stored(
                steps_OC * scale_OG[:, group, None], storage
            )
        scale_O, zero_O = scale_OG[:, group], zero_OG[:, group]
        for i in range(columns.start, columns.stop):
            pull_O = (weight_OI - decoded_OI) @ hessian_II[:, i]
            target_O = decoded_OI[:, i] + pull_O / hessian_II[i, i]
            codes_OI[:, i] = _codes(target_O, scale_O, zero_O, bits)
            decoded_OI[:, i] = _stored(scale_O * (codes_OI[:, i] - zero_O), storage)
    return Quantized(codes_OI, scale_OG, zero_OG, decoded_OI)
