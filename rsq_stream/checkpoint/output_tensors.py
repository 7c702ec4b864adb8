"""Every tensor of an output, announced."""

from collections.abc import Callable

import torch

from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.formats.base import OutputTensor
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import LM_HEAD_LINEAR
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD, block_prefix


def output_tensors(
    architecture: Architecture,
    plan: QuantizationPlan,
    dtype_of: Callable[[str], torch.dtype],
) -> list[OutputTensor]:
    """Announce every tensor of the output, in the order of the forward pass.

    ``dtype_of`` gives the source type of a tensor by its name.
    """
    tensors = [
        OutputTensor(EMBEDDING, dtype_of(EMBEDDING), _outer(architecture, EMBEDDING))
    ]
    for block in range(architecture.blocks):
        prefix = block_prefix(block)
        linears = architecture.linears(block)
        for name, shape in architecture.block_shapes(block).items():
            linear = name.removesuffix(".weight")
            dtype = dtype_of(prefix + name)
            if linear in linears:
                tensors += _stored(prefix + linear, shape, plan, dtype)
            else:
                tensors.append(OutputTensor(prefix + name, dtype, shape))
    tensors.append(
        OutputTensor(FINAL_NORM, dtype_of(FINAL_NORM), (architecture.width,))
    )
    if not output_is_tied(architecture, plan):
        source = EMBEDDING if architecture.tied else LM_HEAD
        shape = _outer(architecture, EMBEDDING)
        tensors += _stored(LM_HEAD_LINEAR, shape, plan, dtype_of(source))
    return tensors


def _stored(
    linear: str, shape: tuple[int, ...], plan: QuantizationPlan, dtype: torch.dtype
) -> list[OutputTensor]:
    outputs, inputs = shape
    scheme = plan.scheme(linear, inputs)
    if scheme is None:
        return [OutputTensor(f"{linear}.weight", dtype, shape)]
    return FORMATS[plan.output_format].tensors(linear, (outputs, inputs), scheme, dtype)


def _outer(architecture: Architecture, name: str) -> tuple[int, ...]:
    return architecture.outer_shapes()[name]


def output_is_tied(architecture: Architecture, plan: QuantizationPlan) -> bool:
    """Whether the output's head is still its embedding: not after a rotation."""
    return architecture.tied and plan.residual_rotation == "none"
