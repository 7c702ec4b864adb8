"""The grid of a plan."""

import torch

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids.base import Grid, GridPlan


def make_grid(plan: GridPlan, bits: int, storage_type: torch.dtype) -> Grid:
    """Return the plan's grid of so many bits, for weights of that stored type."""
    return GRIDS[plan.grid](
        bits=bits,
        symmetric=plan.symmetric,
        signed_scales=plan.signed_scales,
        clip_exponent=plan.clip_exponent,
        clip_steps=plan.clip_steps,
        storage_type=storage_type,
    )
