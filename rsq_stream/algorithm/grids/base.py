"""What the solver and a plan ask of a grid, and how its codes are packed."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsq_stream.errors import UsageError, require
from rsq_stream.ops.column_sweep import Swept
from rsq_stream.ops.pack import pack, packed_words, unpack
from rsq_stream.ops.rounding import Rounded

CLIP_STEP = 0.01
"""Candidate scales shrink by 1 % of the full range, as in the reference code."""
_TOGETHER = {2: "twos", 4: "fours", 8: "eights"}
"""Inputs that share a code, in words."""


@runtime_checkable
class GridPlan(Protocol):
    """The fields of a plan that a grid looks at before it is used."""

    @property
    def grid(self) -> str:
        """Name of the grid."""

    @property
    def method(self) -> str:
        """Name of the method."""

    @property
    def bits(self) -> int:
        """Bits per code."""

    @property
    def override_bits(self) -> Collection[int]:
        """Bits of linears that have their own and are quantized."""

    @property
    def group_size(self) -> int:
        """Inputs per scale, -1 for the whole row."""

    @property
    def clip_steps(self) -> int:
        """Candidates of the search for a scale."""

    @property
    def symmetric(self) -> bool:
        """Codes lie around zero, without zero points."""

    @property
    def signed_scales(self) -> bool:
        """Scales may be negative."""

    @property
    def act_order(self) -> bool:
        """Columns are quantized by descending diagonal of H."""

    @property
    def clip_exponent(self) -> float:
        """Exponent of the error that the scale search minimises."""

    @property
    def tile_columns(self) -> int:
        """Columns per block of the sweep."""


@dataclass(frozen=True, kw_only=True)
class Grid(ABC):
    """The values that codes of so many bits can stand for.

    ``search`` picks scale and zero point for given weights. The class says what holds
    for all its grids, so that nothing else needs to know which of them there are.
    """

    title: ClassVar[str] = ""
    """The grid in words."""
    output_format: ClassVar[str] = "rsq-stream-grid"
    """The format that stores its codes where no other is asked for."""
    bit_widths: ClassVar[Collection[int]] = range(2, 9)
    """Bits that its codes may have."""
    mixed_bits: ClassVar[bool] = False
    """Whether ``--bpw`` may choose the bits of each linear."""
    zero_points: ClassVar[bool] = False
    """Whether a group may have a zero point."""
    takes_groups: ClassVar[bool] = True
    """Whether inputs of a row may have scales by group; otherwise a row has one."""
    takes_signed_scales: ClassVar[bool] = True
    """Whether a negative scale gives levels that no positive one does."""
    inputs_per_code: ClassVar[int] = 1
    """Inputs that share a stored code."""
    trials: ClassVar[tuple[float, ...]] = ()
    """Shares of a row's searched scale that are tried too, by the loss they leave."""

    bits: int
    storage_type: torch.dtype
    """Type of stored scales and of decoded weights: the model's."""
    symmetric: bool = True
    signed_scales: bool = True
    clip_exponent: float = 2.0
    clip_steps: int = 80

    @classmethod
    def in_words(cls, *, symmetric: bool) -> str:
        """Return the grid in words, as tables and model cards show it."""
        del symmetric
        return cls.title

    @classmethod
    def require_plan(cls, plan: GridPlan) -> None:
        """Refuse a plan that this grid cannot follow.

        Raises
        ------
        UsageError
            With the option, what it must be and what it is.
        """
        option = f"with --grid {plan.grid}"
        if plan.method == "rotate":
            raise UsageError("--method rotate quantizes nothing: leave --grid out")
        if not plan.symmetric and not cls.zero_points:
            raise UsageError(f"--asymmetric: there are no zero points {option}")
        widths = ", ".join(map(str, cls.bit_widths))
        require(plan.bits in cls.bit_widths, "bits", plan.bits, f"{widths} {option}")
        for bits in plan.override_bits:
            fits = bits in cls.bit_widths
            require(fits, "override", f"{bits} bits", f"{widths} bits {option}")
        if not cls.takes_groups:
            row = plan.group_size == -1
            require(row, "group-size", plan.group_size, f"-1 {option}")
        if not cls.takes_signed_scales:
            require(not plan.signed_scales, "signed-scales", "on", f"off {option}")
        if cls.inputs_per_code > 1:
            # Inputs that share a code must stay side by side, in whole codes a tile.
            require(not plan.act_order, "act-order", "on", f"off {option}")
            if plan.tile_columns % cls.inputs_per_code:
                raise UsageError(
                    f"tiles must be a multiple of {cls.inputs_per_code} columns"
                    f" {option}, not {plan.tile_columns}"
                )

    @classmethod
    def require_inputs(cls, grid: str, linear: str, inputs: int) -> None:
        """Refuse a linear whose inputs do not fill whole codes.

        Raises
        ------
        UsageError
            With the linear, and how to keep it.
        """
        count = cls.inputs_per_code
        if inputs % count:
            raise UsageError(
                f"--grid {grid} takes inputs by {_TOGETHER.get(count, f'{count}s')},"
                f" and {linear} has {inputs}; keep it with --override"
                f' "{linear.rpartition(".")[2]}=16"'
            )

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def implied_zero(self) -> float:
        """The zero point of every group where none is stored."""
        return 0.0

    @abstractmethod
    def search(
        self, target_RC: Float[Tensor, "R C"]
    ) -> tuple[Float[Tensor, "R"], Float[Tensor, "R"]]:
        """Return scale and zero point per row; scales are exact in the stored type."""

    @abstractmethod
    def levels(
        self, scale_R: Float[Tensor, "R"], zero_R: Float[Tensor, "R"]
    ) -> Float[Tensor, "R L"]:
        """Return what each code decodes to, per row, as a loader computes it."""

    @abstractmethod
    def units(self, code: Tensor, zero: Tensor) -> Tensor:
        """Return what codes stand for before the scale."""

    @abstractmethod
    def nearest(
        self,
        target_RC: Float[Tensor, "R C"],
        scale_R: Float[Tensor, "R"],
        zero_R: Float[Tensor, "R"],
    ) -> Float[Tensor, "R C"]:
        """Return the codes of plain rounding to nearest, as fp32 whole numbers."""

    @abstractmethod
    def round(
        self,
        weight_RC: Tensor,
        scale_R: Tensor,
        zero_R: Tensor,
        level_RL: Tensor,
    ) -> Rounded:
        """Round a block of columns plainly."""

    @abstractmethod
    def sweep(
        self,
        target_RC: Tensor,
        weight_RC: Tensor,
        upper_CC: Tensor,
        *,
        scale_R: Tensor,
        zero_R: Tensor,
        level_RL: Tensor,
    ) -> Swept:
        """Quantize a block of columns with error feedback."""

    @abstractmethod
    def descend(
        self,
        code_RC: Tensor,
        pull_RC: Tensor,
        hessian_CC: Tensor,
        *,
        scale_R: Tensor,
        zero_R: Tensor,
        level_RL: Tensor,
    ) -> Tensor:
        """Return better codes for a block of columns."""

    @abstractmethod
    def decode(
        self, code_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor
    ) -> Float[Tensor, "O I"]:
        """Return the weights as a loader will see them, fp32."""

    def packed_shape(
        self, outputs: int, inputs: int
    ) -> tuple[torch.dtype, tuple[int, int]]:
        """Return type and shape of a linear's packed codes."""
        return torch.int32, (outputs, packed_words(inputs, self.bits))

    def pack(self, code_OI: Tensor) -> Tensor:
        """Pack codes as they are stored: dense, row by row (``ops/pack.py``)."""
        return pack(code_OI, self.bits)

    def unpack(self, packed_OW: Tensor, inputs: int) -> Tensor:
        """Unpack the codes of so many inputs."""
        return unpack(packed_OW, self.bits, inputs)

    def stored(self, scale: Tensor) -> Tensor:
        """Round scales of either sign to the stored type."""
        return scale.sign() * self.stored_sizes(scale.abs())

    def stored_sizes(self, scale: Tensor) -> Tensor:
        """Round scales of no sign; what would be stored as 0 or infinity is mended."""
        info = torch.finfo(self.storage_type)
        # Whole levels must be finite too: fp16 ends at 65504.
        largest = info.max / (self.top + 1)
        stored = scale.clamp(max=largest).to(self.storage_type).float()
        return torch.where(scale > 0, stored.clamp_(min=info.tiny), 1.0)

    def rounded(self, weight: Tensor) -> Tensor:
        """Round to the model's type and come back to fp32."""
        return weight.to(self.storage_type).float()


@functools.cache
def shrinking_shares(steps: int, device: torch.device) -> Float[Tensor, "P"]:
    """Return the candidates' shares of a full range: 1.00, 0.99, ..."""
    return 1 - CLIP_STEP * torch.arange(steps, dtype=torch.float32, device=device)


def picked(
    scale_RP: Float[Tensor, "R P"], best_R: Int[Tensor, "R"], *, mirrored: bool
) -> Float[Tensor, "R"]:
    """Return each row's best candidate: p in ``best_R``, or for its mirror -1 - p."""
    if not mirrored:
        return scale_RP.gather(1, best_R[:, None])[:, 0]
    index_R = torch.where(best_R < 0, -1 - best_R, best_R)
    scale_R = scale_RP.gather(1, index_R[:, None])[:, 0]
    return torch.where(best_R < 0, -scale_R, scale_R)
