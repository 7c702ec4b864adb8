"""The rotations that a plan names, as dense matrices for the textbook."""

import torch
from torch import Tensor

from rsq_stream.algorithm.rotation.rotation import Rotation, make_rotation
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.architecture import Architecture


def matrix_of(rotation: Rotation) -> Tensor:
    """Return Q in float64."""
    return rotation.apply(torch.eye(rotation.size, dtype=torch.float64))


def textbook_rotations(
    plan: QuantizationPlan, architecture: Architecture
) -> dict[str, Tensor]:
    """Return the matrices by the names that ``textbook.rotate`` has for them."""
    kinds = {
        "q_DD": (plan.residual_rotation, architecture.width),
        "r_KK": (plan.value_rotation, architecture.head_width),
        "heads_HH": (plan.heads_rotation, architecture.heads),
        "mlp_II": (plan.mlp_rotation, architecture.mlp_width),
    }
    return {
        name: matrix_of(make_rotation(kind, size, plan.seed + (stream << 32)))
        for stream, (name, (kind, size)) in enumerate(kinds.items())
        if kind != "none"
    }
