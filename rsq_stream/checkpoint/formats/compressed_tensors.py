"""How a quantized linear lies in the output.

Integers lie as compressed-tensors ``pack-quantized`` has them. Per linear:
``weight_packed`` int32 [O, ceil(I bits / 32)] (dense, see ``ops/pack.py``),
``weight_scale`` [O, G] in the model's type, ``weight_shape`` int64 [2], and
``weight_zero_point`` where the grid has one, packed along O. transformers and vLLM read
it; 2, 3, 5, 6, 7 bits need compressed-tensors >= 0.18.

The other grids no runtime reads. NormalFloat has the same tensors, and its codes stand
for the values of ``algorithm/grids/nf.py``; of E8P, ``weight_packed`` is int16
[O, I / 8], the 16 bits of an index of ``ops/e8p_codebook.py`` for each 8 weights.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.gptq.solver import Solution
from rsq_stream.algorithm.grids._table import decode_table
from rsq_stream.algorithm.grids.integer import decode
from rsq_stream.algorithm.grids.nf import normal_values
from rsq_stream.checkpoint.formats.base import OutputTensor
from rsq_stream.config.schemes import (
    LATTICE,
    LATTICE_WIDTH,
    NORMAL_FLOAT,
    Scheme,
)
from rsq_stream.errors import CheckpointError, UsageError
from rsq_stream.ops.e8p_codebook import digit_values, to_digits, to_indices
from rsq_stream.ops.pack import pack, packed_words, unpack


def linear_tensors(
    name: str, shape: tuple[int, int], scheme: Scheme, scale_type: torch.dtype
) -> list[OutputTensor]:
    """Announce the tensors of one quantized linear.

    Raises
    ------
    UsageError
        The lattice takes weights by eights, and these do not come so.
    """
    outputs, inputs = shape
    groups = scheme.groups(inputs)
    packed_type, words = torch.int32, packed_words(inputs, scheme.bits)
    if scheme.grid == LATTICE:
        packed_type, words = torch.int16, inputs // LATTICE_WIDTH
        if inputs % LATTICE_WIDTH:
            raise UsageError(
                f"--grid {LATTICE} takes inputs by eights, and {name} has {inputs};"
                f' keep it with --override "{name.rpartition(".")[2]}=16"'
            )
    tensors = [
        OutputTensor(f"{name}.weight_packed", packed_type, (outputs, words)),
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
        f"{name}.weight_packed": _packed(solution.code_OI, scheme),
        f"{name}.weight_scale": solution.scale_OG.to(scale_type),
        f"{name}.weight_shape": torch.tensor(solution.code_OI.shape),
    }
    if not scheme.symmetric:
        zero_GO = solution.zero_OG.T.to(torch.uint8).contiguous()
        packed_GR = pack(zero_GO, scheme.bits)
        tensors[f"{name}.weight_zero_point"] = packed_GR.T.contiguous()
    return tensors


def _packed(code_OI: Tensor, scheme: Scheme) -> Tensor:
    if scheme.grid != LATTICE:
        return pack(code_OI, scheme.bits)
    index_ON = to_indices(code_OI)
    # The same 16 bits, as safetensors' signed type has them.
    return torch.where(index_ON >= 2**15, index_ON - 2**16, index_ON).to(torch.int16)


def decode_linear(
    read: Callable[[str], Tensor], name: str, scheme: Scheme
) -> Float[Tensor, "O I"]:
    """Read a stored linear back: round_to_model_type(scale (code - zero)), fp32.

    Of the other grids, round_to_model_type(scale value[code]).

    Raises
    ------
    CheckpointError
        The tensors do not have the shapes and types that belong together.
    """
    outputs, inputs = _checked(read, name, scheme)
    packed_OW = read(f"{name}.weight_packed")
    scale_OG = read(f"{name}.weight_scale")
    if scheme.grid == LATTICE:
        digit_OI = to_digits(packed_OW.int() & 0xFFFF)
        return decode_table(digit_OI, scale_OG, digit_values(), scale_OG.dtype)
    code_OI = unpack(packed_OW, scheme.bits, inputs)
    if scheme.grid == NORMAL_FLOAT:
        value_L = normal_values(scheme.bits)
        return decode_table(code_OI, scale_OG, value_L, scale_OG.dtype)
    if scheme.symmetric:
        zero_OG = torch.full(scale_OG.shape, float(2 ** (scheme.bits - 1)))
    else:
        packed_GR = read(f"{name}.weight_zero_point").T.contiguous()
        zero_OG = unpack(packed_GR, scheme.bits, outputs).T.float()
    return decode(code_OI, scale_OG.float(), zero_OG, scale_OG.dtype)


def _checked(
    read: Callable[[str], Tensor], name: str, scheme: Scheme
) -> tuple[int, int]:
    """Give outputs and inputs of a stored linear, all its tensors fitting them."""
    shape = read(f"{name}.weight_shape")
    scale_OG = read(f"{name}.weight_scale")
    size = tuple(shape.tolist()) if shape.shape == (2,) else ()
    sound = len(size) == 2 and all(0 < number < 2**31 for number in size)
    sound = sound and scale_OG.is_floating_point()
    sound = sound and (scheme.grid != LATTICE or size[1] % LATTICE_WIDTH == 0)
    announced = linear_tensors(name, size, scheme, scale_OG.dtype) if sound else []
    for tensor in announced:
        stored = read(tensor.name)
        sound &= (stored.dtype, tuple(stored.shape)) == (tensor.dtype, tensor.shape)
    if not sound:
        raise CheckpointError(
            f"{name}: its tensors do not fit a weight_shape of {shape.tolist()} and"
            f" {scheme.bits} bits ({scheme.grid}); the checkpoint is damaged"
        )
    return int(size[0]), int(size[1])
