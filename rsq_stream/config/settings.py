"""The options that decide bytes, before their defaults are filled in."""

from dataclasses import dataclass

from rsq_stream.config.schemes import DEFAULT_GRID, UNQUANTIZED

DEFAULT_BITS = 4
LEAST_BITS = 2
"""Stands in a plan with ``bpw`` until the bits are chosen."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of ``quantize`` and ``plan`` that decide bytes; None is a default."""

    method: str = "rsq"
    bits: int | None = None
    """4, where ``bpw`` does not choose them."""
    bpw: float | None = None
    """Bits per weight of the whole output, for which bits are chosen by linear."""
    group_size: int = 128
    overrides: tuple[str, ...] = ()
    """``PATTERN=BITS[gGROUP]``; the last that fits a linear wins."""
    head_bits: int = UNQUANTIZED
    grid: str = DEFAULT_GRID
    output_format: str | None = None
    """By default the format that stores the grid."""
    symmetric: bool = True
    signed_scales: bool | None = None
    """By default where the grid is symmetric and not its own mirror."""
    group_scales: str = "dynamic"
    clip_exponent: float = 2.0
    clip_steps: int = 80
    damping: float = 0.01
    shrinkage: float | None = None
    rotation: str | None = None
    """``portable``, ``full`` or ``none``; by default what the method does."""
    importance: str | None = None
    importance_min: float | None = None
    importance_max: float = 1.0
    importance_tokens: int | None = None
    """By default the strategy's share of the window."""
    importance_chunks: str = ""
    importance_power: int = 1
    importance_visible: str = "no"
    importance_transform: str = "no"
    importance_quantile: float = 0.0
    importance_skip: int = 0
    importance_mask: float = 0.0
    importance_truncate: float = 0.0
    importance_bins: int = 0
    importance_reverse: bool = False
    importance_exact: bool = False
    importance_linears: tuple[str, ...] = ()
    calibration: str = "wikitext2"
    """A data set's name, or a file."""
    samples: int = 256
    sequence_length: int | None = None
    expand: int = 1
    propagate: float | None = None
    propagate_overrides: tuple[str, ...] = ()
    """``PATTERN=A``; the last that fits a linear wins."""
    residual_correction: bool = True
    act_order: bool = False
    sweeps: int | None = None
    refit: bool | None = None
    seed: int = 0
    cache_type: str | None = None
    activation_bits: int = UNQUANTIZED
    activation_group_size: int = -1
    activation_symmetric: bool = True
    activation_clip: float = 1.0
    kv_bits: int = UNQUANTIZED
    kv_symmetric: bool = True
    kv_clip: float = 1.0

    @property
    def usual_bits(self) -> int:
        """The bits of linears without their own; a stand-in until ``bpw`` chooses."""
        if self.bits is not None:
            return self.bits
        return DEFAULT_BITS if self.bpw is None else LEAST_BITS
