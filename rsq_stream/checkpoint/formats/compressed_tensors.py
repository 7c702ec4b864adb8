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
from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.checkpoint.formats.base import OutputTensor
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import CheckpointError
from rsq_stream.ops.pack import pack, packed_words, unpack


def stored_grid(scheme: Scheme, scale_type: torch.dtype) -> Grid:
    """Return the grid of a stored linear, as packing and decoding need it."""
    return GRIDS[scheme.grid](
        bits=scheme.bits, symmetric=scheme.symmetric, storage_type=scale_type
    )


def linear_tensors(
    name: str, shape: tuple[int, int], scheme: Scheme, scale_type: torch.dtype
) -> list[OutputTensor]:
    """Announce the tensors of one quantized linear.

    Raises
    ------
    UsageError
        The grid takes inputs by so many, and these do not come so.
    """
    outputs, inputs = shape
    groups = scheme.groups(inputs)
    grid = stored_grid(scheme, scale_type)
    grid.require_inputs(scheme.grid, name, inputs)
    tensors = [
        OutputTensor(f"{name}.weight_packed", *grid.packed_shape(outputs, inputs)),
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
        f"{name}.weight_packed": stored_grid(scheme, scale_type).pack(solution.code_OI),
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
    grid = stored_grid(scheme, scale_OG.dtype)
    code_OI = grid.unpack(packed_OW, inputs)
    if scheme.symmetric:
        zero_OG = torch.full(scale_OG.shape, grid.implied_zero)
    else:
        packed_GR = read(f"{name}.weight_zero_point").T.contiguous()
        zero_OG = unpack(packed_GR, scheme.bits, outputs).T.float()
    return grid.decode(code_OI, scale_OG, zero_OG)


def _checked(
    read: Callable[[str], Tensor], name: str, scheme: Scheme
) -> tuple[int, int]:
    """Give outputs and inputs of a stored linear, all its tensors fitting them."""
    shape = read(f"{name}.weight_shape")
    scale_OG = read(f"{name}.weight_scale")
    size = tuple(shape.tolist()) if shape.shape == (2,) else ()
    sound = len(size) == 2 and all(0 < number < 2**31 for number in size)
    sound = sound and scale_OG.is_floating_point()
    sound = sound and size[1] % GRIDS[scheme.grid].inputs_per_code == 0
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
