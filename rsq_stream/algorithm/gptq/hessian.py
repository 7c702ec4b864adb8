"""The weighted Hessian of a linear's inputs, H = sum over tokens of w x x^T.

Only the upper triangle is accumulated, by panels of columns. A panel is computed
by one worker, one unit after the other: neither the number of workers nor the
number of units in flight changes a bit.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.ops.two_terms import add_product, two_terms
from rsq_stream.runtime.worker_pool import Pool


class Hessian:
    """Upper triangle of H, fp32, with the sum of the weights beside it."""

    def __init__(self, inputs: int, panel: int, device: torch.device) -> None:
        self.matrix_II: Float[Tensor, "I I"] = torch.zeros(
            inputs, inputs, dtype=torch.float32, device=device
        )
        self.panel = panel
        self.tokens = 0

    def add(self, units: list[tuple[Tensor, Tensor]], pool: Pool) -> None:
        """Add units of (inputs ``[T, I]``, token weights ``[T]``), in their order.

        Inputs are fp32 (or bf16 on CUDA, where the products go in hi and lo
        terms). Token weights that are rounded to bf16 make those terms exact, others
        leave an error of 2**-17 of a product at most.
        """
        inputs = self.matrix_II.shape[0]
        weights = [None if _all_one(weight_T) else weight_T for _, weight_T in units]

        def add_panel(start: int) -> None:
            end = min(start + self.panel, inputs)
            panel_IC = self.matrix_II[:end, start:end]
            for (x_TI, _), weight_T in zip(units, weights, strict=True):
                accumulate(panel_IC, x_TI[:, :end], x_TI[:, start:end], weight_T)

        # The highest first: they take the longest.
        pool.map(add_panel, reversed(range(0, inputs, self.panel)))
        self.tokens += sum(x_TI.shape[0] for x_TI, _ in units)


def _all_one(weight_T: Float[Tensor, "T"]) -> bool:
    """Whether weights change nothing; a GPU is not asked, as one would wait for it."""
    return not weight_T.is_cuda and bool((weight_T == 1).all())


def accumulate(
    panel_IC: Float[Tensor, "I C"],
    x_TI: Tensor,
    x_TC: Tensor,
    weight_T: Float[Tensor, "T"] | None,
) -> None:
    """Compute ``panel += x_TI^T (w * x_TC)`` in place, accumulating in fp32.

    fp32 inputs: one fp32 product. bf16 inputs: two products with fp32 results, of the
    terms that w * x is the sum of; with w in bf16 it has 16 significant bits, no more.
    """
    if x_TI.dtype == torch.float32:
        weighted_TC = x_TC if weight_T is None else weight_T[:, None] * x_TC
        panel_IC.addmm_(x_TI.T, weighted_TC)
        return
    high, low, unit = two_terms(x_TC, x_TI.dtype, weight_T)
    for term_TC in (high, low):
        add_product(panel_IC, x_TI.T, term_TC, unit)


def flat(x_BTI: Tensor) -> Tensor:
    """Lay the sequences of a unit end to end: ``[B T, I]``."""
    return x_BTI.reshape(-1, x_BTI.shape[-1])
