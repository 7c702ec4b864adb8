"""What decides the bytes: ``QuantizationPlan``.

Its canonical JSON is hashed into the journal and the output. What may change between
a kill and the resume without changing one byte is in ``run_options.py``.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsq_stream.config.activations import ActivationFields
from rsq_stream.config.importance import ImportanceFields
from rsq_stream.config.overrides import Override, parse_override
from rsq_stream.config.propagation import PropagationFields
from rsq_stream.config.rotation import RotationFields
from rsq_stream.config.schemes import (
    DEFAULT_GRID,
    GROUP_SIZES,
    LM_HEAD_LINEAR,
    UNQUANTIZED,
    Scheme,
)
from rsq_stream.errors import one_of, require

MATHS_VERSION = 3
"""Raised whenever the same plan would give other bytes than before."""

METHODS = ("rsq", "quarot", "gptq", "rtn", "rotate")
"""``rotate`` quantizes nothing: it writes the rotated model in the source's type."""
FLOAT_TYPES = ("float32", "bfloat16", "float16")
DEVICE_FIELDS = (
    "device_kind",
    "compute_type",
    "hessian_panel",
    "tile_columns",
    "tile_rows",
    "tile_weights",
)
"""Plan fields that follow from the device: all that ``allow_device_change`` lets by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationPlan(
    RotationFields, PropagationFields, ImportanceFields, ActivationFields
):
    """Everything that decides the output's bytes.

    Rounded activations are what the quantized stream of a calibrated run sees; they
    are simulated again when the output is evaluated.
    """

    source_sha256: str
    """Hash of the source's config and shard headers (names, types, shapes)."""
    method: str
    """One of ``METHODS``."""
    bits: int
    """Bits per code, 2 to 8."""
    group_size: int
    """Inputs that share a scale: 32, 64, 128, or -1 for the whole row. A linear
    whose inputs it does not divide falls back to -1."""
    overrides: tuple[str, ...]
    """Linears with bits and group size of their own, sorted: ``NAME=BITS[gGROUP]``, 16
    for one that is kept; the head is quantized only where it is among them."""
    symmetric: bool
    """Codes around zero; otherwise a zero point per group."""
    signed_scales: bool
    """The symmetric grid may be mirrored, kept as a negative scale."""
    group_scales: str
    """``dynamic``: searched when the sweep reaches the group; ``static``: before."""
    clip_exponent: float
    """Exponent of the error that the clip search minimises."""
    clip_steps: int
    """Candidate scales per orientation, 1 % apart from the full range down."""
    act_order: bool
    """Columns are quantized by descending diagonal of H, groups staying whole."""
    sweeps: int
    """Passes of coordinate descent over the codes after the solver's own."""
    refit: bool
    """Scales are fitted to the codes again, by least squares in the Hessian's norm."""
    damping: float
    """Added to the Hessian's diagonal, as a share of its mean."""
    shrinkage: float
    """Damping added for each input per calibration token: few tokens say little."""
    calibration: str
    """Name of the data set, or ``file``; ``none`` where the method needs none."""
    windows_sha256: str
    """Hash of the calibration tokens; empty where none are needed."""
    samples: int
    sequence_length: int
    expand: int
    """Rolled copies per window, 1 for none."""
    seed: int
    cache_type: str
    """Type of stored activations: the source's."""
    compute_type: str
    """Type of the forward passes."""
    unit_sequences: int
    """Sequences per forward pass and GEMM: the unit of computation."""
    hessian_panel: int
    """Columns per panel of the Hessian."""
    tile_columns: int
    """Columns per tile of the factorisation and per block of the sweep."""
    tile_rows: int
    """Output rows per tile of the solve, at least."""
    shard_bytes: int
    """Largest output shard (a single larger tensor gets its own)."""
    grid: str = DEFAULT_GRID
    """What codes stand for, by a name of ``algorithm/grids``."""
    tile_weights: int = 0
    """Weights per tile: of a narrow linear more rows than ``tile_rows``."""
    output_format: str = "compressed-tensors"
    """How the output is stored, by a name of ``checkpoint/formats``."""
    maths_version: int = MATHS_VERSION
    device_kind: str = ""
    """Processor and library versions that the bits depend on."""

    def __post_init__(self) -> None:
        require(self.method in METHODS, "method", self.method, one_of(METHODS))
        require(2 <= self.bits <= 8, "bits", self.bits, "2 to 8")
        sizes = ", ".join(map(str, GROUP_SIZES))
        require(self.group_size in GROUP_SIZES, "group-size", self.group_size, sizes)
        own = _parsed(self.overrides).values()
        whole = not self.act_order or all(made.group_size is None for made in own)
        require(whole, "act-order", "on", "off where linears have their own groups")
        require(
            self.group_scales in ("dynamic", "static"),
            "group-scales",
            self.group_scales,
            "dynamic or static",
        )
        require(1 <= self.clip_steps <= 99, "clip-steps", self.clip_steps, "1 to 99")
        require(
            1 <= self.clip_exponent <= 8,
            "clip-exponent",
            self.clip_exponent,
            "1 to 8",
        )
        require(0 <= self.seed < 2**62, "seed", self.seed, "0 to 2**62 - 1")
        require(0 < self.damping <= 1, "damping", self.damping, "above 0, at most 1")
        require(0 <= self.shrinkage <= 99, "shrinkage", self.shrinkage, "0 to 99")
        require(0 <= self.sweeps <= 99, "sweeps", self.sweeps, "0 to 99")
        for name in ("cache_type", "compute_type"):
            require(
                getattr(self, name) in FLOAT_TYPES,
                name.replace("_", "-"),
                getattr(self, name),
                one_of(FLOAT_TYPES),
            )
        for name in ("unit_sequences", "hessian_panel", "tile_columns", "tile_rows"):
            size = getattr(self, name)
            require(size >= 1, name.replace("_", "-"), size, "1 or more")
        require(self.tile_weights >= 0, "tile-weights", self.tile_weights, "0 or more")
        require(self.samples >= 1, "samples", self.samples, "1 or more")
        require(
            self.sequence_length >= 2,
            "sequence-length",
            self.sequence_length,
            "2 or more",
        )
        require(
            1 <= self.expand <= self.sequence_length,
            "expand",
            self.expand,
            f"1 to the sequence length ({self.sequence_length})",
        )
        self.check_rotations()
        self.check_propagation()
        self.check_importance(self.sequence_length)
        self.check_activations()

    @property
    def sequences(self) -> int:
        """Calibration sequences, rolled copies included."""
        return self.samples * self.expand

    @property
    def units(self) -> int:
        """Units of computation; the last one may hold fewer sequences."""
        return -(-self.sequences // self.unit_sequences)

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit of computation."""
        return self.unit_sequences * self.sequence_length

    def tile_rows_of(self, inputs: int) -> int:
        """Return the rows of a linear of so many inputs that are solved together."""
        return max(self.tile_rows, self.tile_weights // inputs)

    def damping_for(self, inputs: int) -> float:
        """Return the damping of a Hessian of so many inputs, at most 1.

        A sample covariance errs by about inputs / tokens. Rolled copies say little new.
        """
        tokens = self.samples * self.sequence_length
        return min(1.0, self.damping + self.shrinkage * inputs / tokens)

    @property
    def needs_calibration(self) -> bool:
        """Whether any activation is looked at."""
        return self.method not in ("rtn", "rotate")

    def canonical_json(self) -> str:
        """One line of JSON with sorted keys: what is hashed and stored."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "QuantizationPlan":
        """Take a plan back from the fields of its JSON.

        Raises
        ------
        TypeError
            A field is missing or unknown.
        UsageError
            A field is out of bounds.
        """
        given = dict(fields)
        for name in ("overrides", "propagate_overrides", "importance_linears"):
            given[name] = tuple(given.get(name, ()))
        return cls(**given)

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    @property
    def override_bits(self) -> frozenset[int]:
        """Bits of the linears that have their own and are quantized."""
        own = _parsed(self.overrides).values()
        return frozenset(made.bits for made in own) - {UNQUANTIZED}

    def override(self, linear: str) -> Override | None:
        """Return what a linear, by its full name, has of its own; None for nothing."""
        return _parsed(self.overrides).get(linear)

    def scheme(self, linear: str, inputs: int) -> Scheme | None:
        """Return how a linear, by its full name, is quantized; None if it is not.

        A group size that does not divide the inputs becomes -1, the whole row.
        """
        if self.method == "rotate":
            return None
        own = self.override(linear)
        if own is None:
            own = Override(UNQUANTIZED if linear == LM_HEAD_LINEAR else self.bits)
        if own.bits == UNQUANTIZED:
            return None
        size = self.group_size if own.group_size is None else own.group_size
        if size != -1 and inputs % size:
            size = -1
        return Scheme(own.bits, size, self.symmetric, self.grid)


@functools.lru_cache(maxsize=8)
def _parsed(overrides: tuple[str, ...]) -> dict[str, Override]:
    return dict(parse_override(line) for line in overrides)
