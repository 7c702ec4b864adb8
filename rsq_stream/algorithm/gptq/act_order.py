"""Act-order that leaves columns in place: heavy inputs are quantized first.

GPTQ decides columns left to right, and what it decides late has nobody left to make
up for it; so columns go in descending order of H's diagonal. To keep groups whole,
groups are ordered by their largest diagonal entry and columns within their group
(the group-aware form, as in GPTQModel). Codes and scales are put back afterwards:
no runtime needs to know.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.solver import Solution


def group_aware_order(
    diagonal_I: Float[Tensor, "I"], group_size: int
) -> Int[Tensor, "I"]:
    """Return the columns in the order to quantize them; -1 is one group of all.

    Equal entries keep their order, so the answer is the same everywhere.
    """
    size = len(diagonal_I) if group_size == -1 else group_size
    diagonal_GC = diagonal_I.reshape(-1, size)
    inside_GC = diagonal_GC.sort(dim=1, descending=True, stable=True).indices
    groups_G = diagonal_GC.amax(1).sort(descending=True, stable=True).indices
    return (inside_GC + size * torch.arange(len(diagonal_GC)).to(inside_GC)[:, None])[
        groups_G
    ].reshape(-1)


def reorder(hessian: Hessian, order_I: Int[Tensor, "I"]) -> None:
    """Permute rows and columns of H; its upper triangle is valid before and after."""
    matrix_II = hessian.matrix_II.triu_()
    # The diagonal would count twice.
    whole_II = matrix_II + matrix_II.triu(1).T
    torch.index_select(whole_II[:, order_I], 0, order_I, out=hessian.matrix_II)


def put_back(solution: Solution, order_I: Int[Tensor, "I"]) -> Solution:
    """Return a solution of permuted columns with the columns where they belong."""
    inverse_I = torch.empty_like(order_I)
    inverse_I[order_I] = torch.arange(len(order_I)).to(order_I)
    groups = solution.scale_OG.shape[1]
    size = len(order_I) // groups
    # Groups stay whole: the group of each group's first column tells where it went.
    group_G = inverse_I.reshape(groups, size)[:, 0] // size
    return dataclasses.replace(
        solution,
        code_OI=solution.code_OI[:, inverse_I].contiguous(),
        scale_OG=solution.scale_OG[:, group_G].contiguous(),
        zero_OG=solution.zero_OG[:, group_G].contiguous(),
    )
