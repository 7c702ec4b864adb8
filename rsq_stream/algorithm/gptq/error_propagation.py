"""Correct the error that earlier layers have made: targets for the solver.

For a linear W with input u in the quantized stream and u_full in the other, and for
o and down the residual r that its output is added to,

    G  = sum over tokens of w_t [ W (u_full - u) + (r_full - r) ] u^T
    W' = W + a G (H + lambda I)^-1

is, for a = 1 and lambda = 0, the least-squares answer to "give the full-precision
output from the input that the quantized model has"; a < 1 damps it. Known as
asymmetric calibration (GPTAQ, arXiv 2504.02692) and as quantization error
propagation (QEP, arXiv 2504.09629).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsq_stream.algorithm.gptq.hessian import flat
from rsq_stream.algorithm.gptq.ldl import Factor
from rsq_stream.ops.two_terms import add_product, two_terms
from rsq_stream.runtime.worker_pool import Pool

OUTPUTS = 2048
"""Rows of a 16-bit weight that are used at a time, for the cross term."""


class StageInput(NamedTuple):
    """What the linears of a stage read, and what their output is added to."""

    value_BTI: Tensor
    residual_BTD: Tensor | None = None
    """x for o, h for down; the other linears add to nothing."""


class CrossTerm:
    """G of one linear, or C - H of all linears that share an input, in fp32.

    Accumulated like the Hessian: by panels of columns, each by one worker, unit after
    unit. Linears that share their input and add to no residual share ``C - H``
    (inputs x inputs): G = W (C - H). For o and down G itself is accumulated, which
    for down is the smaller.
    """

    def __init__(
        self, outputs: int | None, inputs: int, panel: int, device: torch.device
    ) -> None:
        """Make G of ``outputs`` rows; None for the C - H of linears that share it."""
        self.shared = outputs is None
        rows = inputs if outputs is None else outputs
        self.matrix_RI: Float[Tensor, "R I"] = torch.zeros(
            rows, inputs, dtype=torch.float32, device=device
        )
        # Panels are for workers: a GPU makes one product, and its terms once.
        self.panel = inputs if device.type == "cuda" else panel

    def add(self, units: list[tuple[Tensor, Tensor]], pool: Pool) -> None:
        """Add units of (weighted errors ``[T, R]`` in fp32, inputs ``[T, I]``)."""
        inputs = self.matrix_RI.shape[1]

        def add_panel(start: int) -> None:
            end = min(start + self.panel, inputs)
            for error_TR, u_TI in units:
                accumulate(self.matrix_RI[:, start:end], error_TR, u_TI[:, start:end])

        pool.map(add_panel, range(0, inputs, self.panel))

    def reorder(self, order_I: Int[Tensor, "I"]) -> None:
        """Follow the Hessian's columns into another order."""
        self.matrix_RI = self.matrix_RI[:, order_I]

    def correction(
        self,
        weight_RI: Float[Tensor, "R I"],
        rows: slice,
        factor: Factor,
        share: float,
    ) -> Float[Tensor, "R I"]:
        """Compute share G (H + lambda I)^-1 for rows of W, with the solver's factor.

        H + lambda I = U D U^T, so it is two triangular solves a row: rows are
        independent. W is in the model's order, what is given in that of the Hessian.
        """
        upper_II = factor.matrix_II
        cross_RI = weight_RI @ self.matrix_RI if self.shared else self.matrix_RI[rows]
        half_RI = torch.linalg.solve_triangular(
            upper_II.T, cross_RI, upper=False, left=False, unitriangular=True
        )
        half_RI /= factor.scale_I
        whole_RI: Tensor = torch.linalg.solve_triangular(
            upper_II, half_RI, upper=True, left=False, unitriangular=True
        )
        return whole_RI.mul_(share)


def accumulate(
    panel_RC: Float[Tensor, "R C"], error_TR: Float[Tensor, "T R"], u_TC: Tensor
) -> None:
    """Compute ``panel += error_TR^T u_TC`` in place, accumulating in fp32.

    bf16 inputs: the error goes in two bf16 terms, which keep 16 of its bits.
    """
    if u_TC.dtype == torch.float32:
        panel_RC.addmm_(error_TR.T, u_TC)
        return
    high, low, unit = two_terms(error_TR, u_TC.dtype)
    for term_TR in (high, low):
        add_product(panel_RC, term_TR.T, u_TC, unit)


def stream_error(
    full_TI: Tensor, u_TI: Tensor, weight_T: Float[Tensor, "T"]
) -> Float[Tensor, "T I"]:
    """Return w (u_full - u), of inputs or of residuals.

    Of inputs it makes ``CrossTerm`` accumulate C - H.
    """
    return weight_T[:, None] * (full_TI.float() - u_TI.float())


def cross_term_error(
    quantized: StageInput,
    full: StageInput,
    weight_T: Tensor,
    weight_OI: Tensor | None,
) -> Tensor:
    """Return what a unit adds to a cross term, for each token: w times the error.

    That of the input, or with ``weight_OI`` that of the output and its residual.
    """
    weighted_TI = stream_error(
        flat(full.value_BTI), flat(quantized.value_BTI), weight_T
    )
    if weight_OI is None:
        return weighted_TI
    error_TO = _products(weighted_TI, weight_OI)
    if quantized.residual_BTD is not None and full.residual_BTD is not None:
        residuals = flat(full.residual_BTD), flat(quantized.residual_BTD)
        error_TO += stream_error(*residuals, weight_T)
    return error_TO


def _products(weighted_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Compute x W^T in fp32; of weights in another type or place, some rows at a time.

    Whole, they would be there twice. Of 16-bit weights a GPU makes products of x's two
    terms, in which fp32 would take it ten times as long.
    """
    if weight_OI.dtype == torch.float32 and weight_OI.device == weighted_TI.device:
        return weighted_TI @ weight_OI.T
    parts = weight_OI.split(OUTPUTS)
    if not weighted_TI.is_cuda or weight_OI.dtype == torch.float32:
        return torch.cat([weighted_TI @ part.to(weighted_TI).T for part in parts], 1)
    made_TO = weighted_TI.new_zeros(len(weighted_TI), len(weight_OI))
    high, low, unit = two_terms(weighted_TI, weight_OI.dtype)
    for made_TR, part_RI in zip(made_TO.split(OUTPUTS, 1), parts, strict=True):
        there_IR = part_RI.to(weighted_TI.device).T
        for term_TI in (high, low):
            add_product(made_TR, term_TI, there_IR, unit)
    return made_TO
