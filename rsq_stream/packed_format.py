"""compressed-tensors ``pack-quantized``: how a quantized linear lies in the output.

Per linear: ``weight_packed`` int32 [O, ceil(I bits / 32)] (dense, see
``algorithm/packing.py``), ``weight_scale`` [O, G] in the model's type,
``weight_shape`` int64 [2], and ``weight_zero_point`` where the grid has one,
packed along O. transformers and vLLM read it; 2, 3, 5, 6, 7 bits need
compressed-tensors >= 0.18.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.grid import decode
from rsq_stream.algorithm.packing import pack, packed_words, unpack
from rsq_stream.algorithm.solver import Solution
from rsq_stream.config import QuantizationPlan
from rsq_stream.model.architecture import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEARS,
    Architecture,
    block_prefix,
)
from rsq_stream.schemes import HEAD_LINEAR, Scheme
from rsq_stream.storage.writer import OutputTensor


def linear_tensors(
    name: str, shape: tuple[int, int], scheme: Scheme, scale_type: torch.dtype
) -> list[OutputTensor]:
    """Announce the tensors of one quantized linear."""
    outputs, inputs = shape
    groups = scheme.groups(inputs)
    words = packed_words(inputs, scheme.bits)
    tensors = [
        OutputTensor(f"{name}.weight_packed", torch.int32, (outputs, words)),
        OutputTensor(f"{name}.weight_scale", scale_type, (outputs, groups)),
        OutputTensor(f"{name}.weight_shape", torch.int64, (2,)),
    ]
    if not scheme.symmetric:
        rows = packed_words(outputs, scheme.bits)
        zero = OutputTensor(f"{name}.weight_zero_point", torch.int32, (rows, groups))
        tensors.append(zero)
    return tensors


def encode_linear(
    name: str, solution: Solution, scheme: Scheme, scale_type: torch.dtype
) -> dict[str, Tensor]:
    """Give the tensors of one quantized linear as they are stored."""
    tensors = {
        f"{name}.weight_packed": pack(solution.code_OI, scheme.bits),
        f"{name}.weight_scale": solution.scale_OG.to(scale_type),
        f"{name}.weight_shape": torch.tensor(solution.code_OI.shape),
    }
    if not scheme.symmetric:
        zero_GO = solution.zero_OG.T.to(torch.uint8).contiguous()
        packed_GR = pack(zero_GO, scheme.bits)
        tensors[f"{name}.weight_zero_point"] = packed_GR.T.contiguous()
    return tensors


def decode_linear(
    read: Callable[[str], Tensor], name: str, scheme: Scheme
) -> Float[Tensor, "O I"]:
    """Read a stored linear back: round_to_model_type(scale (code - zero)), fp32."""
    outputs, inputs = read(f"{name}.weight_shape").tolist()
    code_OI = unpack(read(f"{name}.weight_packed"), scheme.bits, inputs)
    scale_OG = read(f"{name}.weight_scale")
    if scheme.symmetric:
        zero_OG = torch.full(scale_OG.shape, float(2 ** (scheme.bits - 1)))
    else:
        packed_GR = read(f"{name}.weight_zero_point").T.contiguous()
        zero_OG = unpack(packed_GR, scheme.bits, outputs).T.float()
    return decode(code_OI, scale_OG.float(), zero_OG, scale_OG.dtype)


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
        for name, shape in architecture.block_shapes().items():
            linear = name.removesuffix(".weight")
            dtype = dtype_of(prefix + name)
            if linear in LINEARS:
                tensors += _stored(prefix + linear, shape, plan, dtype)
            else:
                tensors.append(OutputTensor(prefix + name, dtype, shape))
    tensors.append(
        OutputTensor(FINAL_NORM, dtype_of(FINAL_NORM), (architecture.width,))
    )
    if not output_is_tied(architecture, plan):
        source = EMBEDDING if architecture.tied else HEAD
        shape = _outer(architecture, EMBEDDING)
        tensors += _stored(HEAD_LINEAR, shape, plan, dtype_of(source))
    return tensors


def _stored(
    linear: str, shape: tuple[int, ...], plan: QuantizationPlan, dtype: torch.dtype
) -> list[OutputTensor]:
    outputs, inputs = shape
    scheme = plan.scheme(linear, inputs)
    if scheme is None:
        return [OutputTensor(f"{linear}.weight", dtype, shape)]
    return linear_tensors(linear, (outputs, inputs), scheme, dtype)


def _outer(architecture: Architecture, name: str) -> tuple[int, ...]:
    return architecture.outer_shapes()[name]


def output_is_tied(architecture: Architecture, plan: QuantizationPlan) -> bool:
    """Whether the output's head is still its embedding: not after a rotation."""
    return architecture.tied and plan.residual_rotation == "none"
