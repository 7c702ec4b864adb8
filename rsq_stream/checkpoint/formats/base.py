"""An output format: who loads it, how a linear lies in it, and in which files."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.gptq.solver import Solution
from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids.base import Grid
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import UsageError, require
from rsq_stream.model.architecture import Architecture

Read = Callable[[str], Tensor]
"""Reads a stored tensor by its name."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output, known before it exists."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardLayout:
    """One output shard: its name, its header, where each tensor goes."""

    name: str
    header: bytes
    places: Mapping[str, tuple[int, OutputTensor]]
    """Offset from the file's start, and the tensor."""
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Loader:
    """How an output is loaded in Python, for its model card and the end of a run."""

    introduction: str
    imports: str
    function: str
    """It is called with the folder."""
    remark: str
    """Who else loads the output, or what is needed for it."""
    tags: tuple[str, ...] = ()
    """Tags of the model card that lead to it."""

    def call(self, folder: str) -> str:
        """Return the call that loads a folder."""
        return f'{self.function}("{folder}")'


LOAD_MODEL = Loader(
    introduction="Other loaders refuse it, as they would get it wrong:",
    imports="import rsq_stream",
    function="rsq_stream.load_model",
    remark="and no other loader",
)
"""The loader of outputs that must be marked, so that every other one refuses them."""


class Format(ABC):
    """A way to store an output."""

    loads_with: ClassVar[Loader] = LOAD_MODEL
    """Who loads it where no rotation is left to inference."""
    config_name: ClassVar[str]
    """The format by the name that its config.json has for it."""
    marks_rotations: ClassVar[bool] = True
    """Whether it can say what is left to inference, so that others refuse it."""
    shard_name: ClassVar[re.Pattern[str]]
    """Names of the files that hold its tensors."""
    small_file_names: ClassVar[frozenset[str]]
    """Names of all other files that ``small_files`` may make."""

    @abstractmethod
    def stores(self, grid: type[Grid]) -> bool:
        """Return whether codes of a grid can be stored and read back."""

    def require(self, plan: QuantizationPlan, architecture: Architecture) -> None:
        """Refuse a plan whose output this format cannot store.

        Raises
        ------
        UsageError
            With the option that does not fit, and what would.
        """
        del architecture
        if not self.stores(GRIDS[plan.grid]):
            raise UsageError(
                f"--format {plan.output_format} cannot store --grid {plan.grid}: leave"
                " --format out"
            )
        marked = self.marks_rotations or not plan.rotates_online
        wanted = f"portable or none for {plan.output_format}, which cannot say what is"
        require(marked, "rotation", "full", f"{wanted} left to be done at inference")

    def loader(self, plan: QuantizationPlan) -> Loader:
        """Return who loads the output of a plan."""
        return LOAD_MODEL if plan.rotates_online else self.loads_with

    def runtimes(self, bits: Collection[int], *, symmetric: bool) -> tuple[str, ...]:
        """Name the runtimes that take linears of such bits, and what each needs."""
        del bits, symmetric
        return (self.loads_with.remark,)

    def notices(self, plan: QuantizationPlan) -> list[str]:
        """Return what a user should know about loading the output of a plan."""
        del plan
        return []

    @abstractmethod
    def tensors(
        self, name: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
    ) -> list[OutputTensor]:
        """Announce the tensors of one quantized linear of some type.

        Raises
        ------
        UsageError
            The grid takes inputs by so many, and these do not come so.
        """

    def encode(
        self, name: str, solution: Solution, scheme: Scheme, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return the tensors of one quantized linear as they are stored."""
        shape = tuple(solution.code_OI.shape)
        rows = self.encode_rows(name, solution, scheme, dtype)
        return rows | self.encode_whole(name, shape)

    @abstractmethod
    def encode_rows(
        self, name: str, solution: Solution, scheme: Scheme, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return what is stored of some rows; more rows are put behind them."""

    def encode_whole(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return what is stored once for all rows of a linear."""
        del name, shape
        return {}

    @abstractmethod
    def decode(self, read: Read, name: str, scheme: Scheme) -> Float[Tensor, "O I"]:
        """Read a stored linear back, in fp32.

        Raises
        ------
        CheckpointError
            The tensors do not have the shapes and types that belong together.
        """

    @abstractmethod
    def row_reader(
        self, stored: Checkpoint, scheme: Scheme, outputs: int, rows: range
    ) -> Read:
        """Return what reads some rows of a linear with so many outputs, for ``decode``.

        The first row is a multiple of 32.
        """

    @abstractmethod
    def typed_tensor(self, linear: str) -> str:
        """Name the stored tensor that has the type of the linear's weights."""

    @abstractmethod
    def layouts(
        self, tensors: list[OutputTensor], shard_bytes: int
    ) -> list[ShardLayout]:
        """Put tensors into shards of at most ``shard_bytes``, in their order."""

    @abstractmethod
    def small_files(
        self,
        config: Mapping[str, Any],
        plan: QuantizationPlan,
        architecture: Architecture,
        layouts: list[ShardLayout],
    ) -> dict[str, bytes]:
        """Return the files that make shards a model, by name.

        ``config`` is config.json without a word about quantization.
        """

    @abstractmethod
    def recognizes(self, quantization: Mapping[str, Any]) -> bool:
        """Return whether a ``quantization_config`` names this format."""

    @abstractmethod
    def schemes(
        self, quantization: Mapping[str, Any], architecture: Architecture
    ) -> dict[str, Scheme | None]:
        """Read each linear's scheme back by its full name, None if unquantized.

        A linear is absent whose scheme is not as this format writes it.
        """


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return JSON as the files of an output have it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
