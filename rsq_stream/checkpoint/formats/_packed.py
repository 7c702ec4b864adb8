"""Linears as packed codes with scales: what compressed-tensors' ``pack-quantized`` has.

Per linear: ``weight_packed`` (dense, as the grid packs its codes), ``weight_scale``
[O, G] in the model's type, ``weight_shape`` int64 [2], and ``weight_zero_point`` where
there is one, packed along O.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.gptq.solver import Solution
from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.checkpoint.formats._safetensors import SafetensorsFormat
from rsq_stream.checkpoint.formats.base import OutputTensor, Read
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import CheckpointError
from rsq_stream.ops.pack import pack, packed_words, unpack


class PackedFormat(SafetensorsFormat):
    """A format with the tensors of ``pack-quantized``, for the codes of any grid."""

    def tensors(
        self, name: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
    ) -> list[OutputTensor]:
        """Announce the tensors of one quantized linear of some type.

        Raises
        ------
        UsageError
            The grid takes inputs by so many, and these do not come so.
        """
        outputs, inputs = shape
        groups = scheme.groups(inputs)
        grid = _stored_grid(scheme, dtype)
        grid.require_inputs(scheme.grid, name, inputs)
        tensors = [
            OutputTensor(f"{name}.weight_packed", *grid.packed_shape(outputs, inputs)),
            OutputTensor(f"{name}.weight_scale", dtype, (outputs, groups)),
            OutputTensor(f"{name}.weight_shape", torch.int64, (2,)),
        ]
        if not scheme.symmetric:
            rows = packed_words(outputs, scheme.bits)
            zero = f"{name}.weight_zero_point"
            tensors.append(OutputTensor(zero, torch.int32, (rows, groups)))
        return tensors

    def encode_rows(
        self, name: str, solution: Solution, scheme: Scheme, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return codes, scales and zero points of some rows as they are stored."""
        grid = _stored_grid(scheme, dtype)
        tensors = {
            f"{name}.weight_packed": grid.pack(solution.code_OI),
            f"{name}.weight_scale": solution.scale_OG.to(dtype),
        }
        if not scheme.symmetric:
            zero_GO = solution.zero_OG.T.to(torch.uint8).contiguous()
            packed_GR = pack(zero_GO, scheme.bits)
            tensors[f"{name}.weight_zero_point"] = packed_GR.T.contiguous()
        return tensors

    def encode_whole(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the shape of a linear as it is stored."""
        return {f"{name}.weight_shape": torch.tensor(shape)}

    def decode(self, read: Read, name: str, scheme: Scheme) -> Float[Tensor, "O I"]:
        """Read a stored linear back as its grid decodes it, in fp32.

        Raises
        ------
        CheckpointError
            The tensors do not have the shapes and types that belong together.
        """
        outputs, inputs = self._checked(read, name, scheme)
        packed_OW = read(f"{name}.weight_packed")
        scale_OG = read(f"{name}.weight_scale")
        grid = _stored_grid(scheme, scale_OG.dtype)
        code_OI = grid.unpack(packed_OW, inputs)
        if scheme.symmetric:
            zero_OG = torch.full(scale_OG.shape, grid.implied_zero)
        else:
            packed_GR = read(f"{name}.weight_zero_point").T.contiguous()
            zero_OG = unpack(packed_GR, scheme.bits, outputs).T.float()
        return grid.decode(code_OI, scale_OG, zero_OG)

    def _checked(self, read: Read, name: str, scheme: Scheme) -> tuple[int, int]:
        """Return outputs and inputs of a stored linear, once all tensors fit them."""
        shape = read(f"{name}.weight_shape")
        scale_OG = read(f"{name}.weight_scale")
        size = tuple(shape.tolist()) if shape.shape == (2,) else ()
        sound = len(size) == 2 and all(0 < number < 2**31 for number in size)
        sound = sound and scale_OG.is_floating_point()
        sound = sound and size[1] % GRIDS[scheme.grid].inputs_per_code == 0
        announced = self.tensors(name, size, scheme, scale_OG.dtype) if sound else []
        for tensor in announced:
            stored = read(tensor.name)
            sound &= (stored.dtype, tuple(stored.shape)) == (tensor.dtype, tensor.shape)
        if not sound:
            raise CheckpointError(
                f"{name}: its tensors do not fit a weight_shape of {shape.tolist()} and"
                f" {scheme.bits} bits ({scheme.grid}); the checkpoint is damaged"
            )
        return int(size[0]), int(size[1])

    def row_reader(
        self, stored: Checkpoint, scheme: Scheme, outputs: int, rows: range
    ) -> Read:
        """Return what reads some rows of a linear with so many outputs, for ``decode``.

        The first row is a multiple of 32, so that its zero points begin a word.
        """

        def read(name: str) -> Tensor:
            kind = name.rpartition(".")[2]
            if kind == "weight_shape":
                return stored.read(name) - torch.tensor([outputs - len(rows), 0])
            if kind != "weight_zero_point":
                return stored.read_rows(name, torch.arange(rows.start, rows.stop))
            words = slice(rows.start * scheme.bits // 32, None)
            return stored.read(name)[words][: packed_words(len(rows), scheme.bits)]

        return read

    def typed_tensor(self, linear: str) -> str:
        """Name the scales: they have the type of the linear's weights."""
        return f"{linear}.weight_scale"


def _stored_grid(scheme: Scheme, dtype: torch.dtype) -> Grid:
    """Return the grid of a stored linear, as packing and decoding need it."""
    return GRIDS[scheme.grid](
        bits=scheme.bits, symmetric=scheme.symmetric, storage_type=dtype
    )
