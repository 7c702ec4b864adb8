"""One way to read a source or a quantized checkpoint: as full-precision tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from rsq_stream.checkpoint.formats._quantization_config import format_of, schemes_of
from rsq_stream.checkpoint.manifest import served_rounding
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.activations import ActivationRounding
from rsq_stream.config.schemes import LM_HEAD_LINEAR, Scheme
from rsq_stream.errors import CheckpointError
from rsq_stream.model.activation_quantizer import ActivationQuantizer
from rsq_stream.model.architecture import read_architecture
from rsq_stream.model.block import Block
from rsq_stream.model.online_rotation import read_rotations
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD, block_prefix
from rsq_stream.model.transformers_layers import Rope, layer_config


class ModelReader:
    """Reads a model part by part; quantized linears come decoded.

    Blocks round their activations as ``scheme`` has it, by default as the folder says
    it is served.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        scheme: ActivationRounding | None = None,
    ) -> None:
        where = checkpoint.files.where
        self.architecture = read_architecture(checkpoint.config, where)
        self.config = layer_config(self.architecture.family, checkpoint.config)
        self.epsilon: float = self.config.rms_norm_eps
        self._checkpoint = checkpoint
        self._format = format_of(checkpoint.config, where)
        self._schemes = schemes_of(checkpoint.config, self.architecture, where) or {}
        self.online = read_rotations(checkpoint.config, self.architecture, where)
        self.device = device
        scheme = served_rounding(checkpoint) if scheme is None else scheme
        scheme.require_whole_groups(self.architecture.linear_inputs())
        self._quantizer = ActivationQuantizer(scheme)
        norm = checkpoint.entry(FINAL_NORM, (self.architecture.width,))
        self.stored_type = norm.dtype
        self.compute_type = norm.dtype if device.type == "cuda" else torch.float32

    @property
    def quantized(self) -> bool:
        """Whether linears are stored as codes."""
        return bool(self._schemes)

    def embedding(self) -> Tensor:
        """Return the embedding, in the type it is stored in."""
        return self._outer(EMBEDDING)

    def embedded(self, token_BT: Tensor) -> Tensor:
        """Return the rows of the embedding that tokens have, in its stored type."""
        self._checkpoint.entry(EMBEDDING, self.architecture.outer_shapes()[EMBEDDING])
        token_N, place_BT = token_BT.unique(return_inverse=True)
        return self._checkpoint.read_rows(EMBEDDING, token_N)[place_BT]

    def head(self) -> Tensor:
        """Return the head: the embedding where the two are tied."""
        if self.architecture.tied:
            return self._outer(EMBEDDING)
        scheme = self._schemes.get(LM_HEAD_LINEAR)
        if scheme is None:
            return self._outer(LM_HEAD)
        return self._decoded(
            LM_HEAD_LINEAR, scheme, self.architecture.outer_shapes()[LM_HEAD]
        )

    def head_rows(self, first: int, count: int) -> Tensor:
        """Return some rows of the head, decoded; ``first`` is a multiple of 32."""
        tied = self.architecture.tied
        scheme = None if tied else self._schemes.get(LM_HEAD_LINEAR)
        stored, shape = self._checkpoint, self.architecture.outer_shapes()[EMBEDDING]
        rows = range(first, min(first + count, shape[0]))
        if scheme is None or self._format is None:
            name = EMBEDDING if tied else LM_HEAD
            stored.entry(name, shape)
            return stored.read_rows(name, torch.arange(rows.start, rows.stop))
        read = self._format.row_reader(stored, scheme, shape[0], rows)
        return self._decoded(LM_HEAD_LINEAR, scheme, (len(rows), shape[1]), read)

    def final_norm(self) -> Tensor:
        """Return the gain of the norm before the head."""
        return self._outer(FINAL_NORM)

    def _outer(self, name: str) -> Tensor:
        self._checkpoint.entry(name, self.architecture.outer_shapes()[name])
        return self._checkpoint.read(name)

    def block(self, index: int, rope: Rope) -> Block:
        """Read and decode one block, ready to run."""
        tensors = self.block_tensors(index)
        family = self.architecture.family
        return Block(
            family,
            self.config,
            index,
            tensors,
            rope=rope,
            online=self.online,
            quantizer=self._quantizer,
        )

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Read and decode one block, by the names in it."""
        return {
            name: self._tensor(block_prefix(index), name, shape)
            for name, shape in self.architecture.block_shapes(index).items()
        }

    def _tensor(self, prefix: str, name: str, shape: tuple[int, ...]) -> Tensor:
        linear = prefix + name.removesuffix(".weight")
        scheme = self._schemes.get(linear) if name.endswith(".weight") else None
        if scheme is not None:
            tensor = self._decoded(linear, scheme, shape)
        else:
            self._checkpoint.entry(prefix + name, shape)
            tensor = self._checkpoint.read(prefix + name)
        return tensor.to(self.device, self.compute_type)

    def _decoded(
        self,
        linear: str,
        scheme: Scheme,
        shape: tuple[int, ...],
        read: Callable[[str], Tensor] | None = None,
    ) -> Tensor:
        assert self._format is not None
        tensor = self._format.decode(read or self._checkpoint.read, linear, scheme)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self._checkpoint.files.where}: {linear} decodes to"
                f" {list(tensor.shape)}, but config.json makes it {list(shape)}"
            )
        return tensor

    def rope(self, tokens: int) -> Rope:
        """Make the rotary embedding for that many tokens."""
        family = self.architecture.family
        return Rope(
            family,
            self.config,
            tokens=tokens,
            dtype=self.compute_type,
            device=self.device,
        )

    def normalised(self, x_BTD: Tensor, gain_D: Tensor) -> Tensor:
        """Apply the final norm in fp32."""
        x_BTD = x_BTD.float()
        scale = torch.rsqrt(x_BTD.square().mean(-1, keepdim=True) + self.epsilon)
        return x_BTD * scale * gain_D.float()
