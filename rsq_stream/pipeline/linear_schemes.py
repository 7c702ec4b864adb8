"""The grid of a plan: integers, NormalFloat, or the E8P lattice."""

import torch

from rsq_stream.algorithm.grids.e8p import LatticeGrid
from rsq_stream.algorithm.grids.integer import Grid
from rsq_stream.algorithm.grids.nf import NormalFloat
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import INTEGER, LATTICE, NORMAL_FLOAT

_GRIDS = {INTEGER: Grid, NORMAL_FLOAT: NormalFloat, LATTICE: LatticeGrid}


def make_grid(plan: QuantizationPlan, bits: int, storage_type: torch.dtype) -> Grid:
    """Give the grid of a plan and a scheme's bits, for weights of that stored type."""
    return _GRIDS[plan.grid](
        bits=bits,
        symmetric=plan.symmetric,
        signed_scales=plan.signed_scales,
        clip_exponent=plan.clip_exponent,
        clip_steps=plan.clip_steps,
        storage_type=storage_type,
    )
