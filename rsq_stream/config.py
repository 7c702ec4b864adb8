"""The two kinds of settings: what decides the bytes, and what does not.

``QuantizationPlan`` is everything that the output's bytes depend on; its
canonical JSON is hashed into the journal and the output. ``RunOptions`` may
change between a kill and the resume without changing one byte.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rsq_stream.errors import UsageError

MATHS_VERSION = 1
"""Raised whenever the same plan would give other bytes than before."""

METHODS = ("rsq", "quarot", "gptq", "rtn")
IMPORTANCES = ("attncon", "first-n", "uniform")
GROUP_SIZES = (32, 64, 128, -1)
FLOAT_TYPES = ("float32", "bfloat16", "float16")
DEVICE_FIELDS = (
    "device_kind",
    "compute_type",
    "hessian_panel",
    "tile_columns",
    "tile_rows",
)
"""Plan fields that follow from the device: all that ``allow_device_change`` lets by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationPlan:
    """Everything that decides the output's bytes."""

    source_sha256: str
    """Hash of the source's config and shard headers (names, types, shapes)."""
    method: str
    """One of ``METHODS``."""
    bits: int
    """Bits per code, 2 to 8."""
    group_size: int
    """Inputs that share a scale: 32, 64, 128, or -1 for the whole row. A linear
    whose inputs it does not divide falls back to -1."""
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
    residual_rotation: str
    """R1, as ``Rotation.name`` gives it, or ``none``."""
    value_rotation: str
    """R2, per value head, or ``none``."""
    importance: str
    """One of ``IMPORTANCES``."""
    importance_min: float
    importance_max: float
    importance_tokens: int
    """N of ``first-n``; 0 elsewhere."""
    calibration: str
    """Name of the data set, or ``file``; ``none`` where the method needs none."""
    windows_sha256: str
    """Hash of the calibration tokens; empty where none are needed."""
    samples: int
    sequence_length: int
    expand: int
    """Rolled copies per window, 1 for none."""
    seed: int
    propagate: float
    """How much of the error of earlier layers a linear's targets make up for; 0 for
    none, and then no full-precision stream is carried."""
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
    """Output rows per tile of the solve."""
    shard_bytes: int
    """Largest output shard (a single larger tensor gets its own)."""
    output_format: str = "compressed-tensors"
    maths_version: int = MATHS_VERSION
    device_kind: str = ""
    """Processor and library versions that the bits depend on."""

    def __post_init__(self) -> None:
        _require(self.method in METHODS, "method", self.method, _one_of(METHODS))
        _require(2 <= self.bits <= 8, "bits", self.bits, "2 to 8")
        sizes = ", ".join(map(str, GROUP_SIZES))
        _require(self.group_size in GROUP_SIZES, "group-size", self.group_size, sizes)
        _require(
            self.group_scales in ("dynamic", "static"),
            "group-scales",
            self.group_scales,
            "dynamic or static",
        )
        _require(
            self.importance in IMPORTANCES,
            "importance",
            self.importance,
            _one_of(IMPORTANCES),
        )
        _require(1 <= self.clip_steps <= 99, "clip-steps", self.clip_steps, "1 to 99")
        _require(
            1 <= self.clip_exponent <= 8,
            "clip-exponent",
            self.clip_exponent,
            "1 to 8",
        )
        _require(0 <= self.seed < 2**62, "seed", self.seed, "0 to 2**62 - 1")
        _require(0 < self.damping <= 1, "damping", self.damping, "above 0, at most 1")
        _require(0 <= self.sweeps <= 99, "sweeps", self.sweeps, "0 to 99")
        _require(0 <= self.propagate <= 1, "propagate", self.propagate, "0 to 1")
        _require(
            0 <= self.importance_min <= self.importance_max,
            "importance-min",
            self.importance_min,
            f"0 to importance-max ({self.importance_max})",
        )
        _require(
            0 < self.importance_max < float("inf"),
            "importance-max",
            self.importance_max,
            "above 0 and finite",
        )
        for name in ("cache_type", "compute_type"):
            _require(
                getattr(self, name) in FLOAT_TYPES,
                name.replace("_", "-"),
                getattr(self, name),
                _one_of(FLOAT_TYPES),
            )
        for name in ("unit_sequences", "hessian_panel", "tile_columns", "tile_rows"):
            size = getattr(self, name)
            _require(size >= 1, name.replace("_", "-"), size, "1 or more")
        _require(self.samples >= 1, "samples", self.samples, "1 or more")
        _require(
            self.sequence_length >= 2,
            "sequence-length",
            self.sequence_length,
            "2 or more",
        )
        _require(
            1 <= self.expand <= self.sequence_length,
            "expand",
            self.expand,
            f"1 to the sequence length ({self.sequence_length})",
        )
        if self.importance == "first-n":
            _require(
                1 <= self.importance_tokens <= self.sequence_length,
                "importance-tokens",
                self.importance_tokens,
                f"1 to the sequence length ({self.sequence_length})",
            )

    @property
    def sequences(self) -> int:
        """Calibration sequences, rolled copies included."""
        return self.samples * self.expand

    @property
    def units(self) -> int:
        """Units of computation; the last one may hold fewer sequences."""
        return -(-self.sequences // self.unit_sequences)

    @property
    def streams(self) -> int:
        """Streams of activations: the quantized, and the full-precision one beside."""
        return 2 if self.propagate > 0 else 1

    @property
    def needs_calibration(self) -> bool:
        """Whether any activation is looked at."""
        return self.method != "rtn"

    def canonical_json(self) -> str:
        """One line of JSON with sorted keys: what is hashed and stored."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def group_size_for(self, inputs: int) -> int:
        """Give the group size of a linear: the plan's, or -1 if that cannot divide."""
        if self.group_size == -1 or inputs % self.group_size:
            return -1
        return self.group_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionPlan:
    """How a plan runs within the budgets of this machine; decides no byte."""

    in_flight: int
    """Units between two barriers of a pass."""
    resident_units: int
    """Units of each slot that stay in host memory; the others go to disk."""
    slots: int
    """Activation slots alive at once."""
    slot_bytes: int
    working_bytes: int
    """Host memory beside the resident units: block, Hessian, units in flight."""
    scratch_bytes: int
    """High-water mark of the work folder."""
    written_bytes: int
    """Everything written to disk over the run, output included."""
    source_bytes: int
    output_bytes: int
    """The output's shards, exactly."""
    small_bytes: int
    """About what the output's other files and the journal take."""
    bits_per_weight: float
    """Bits of the whole output per weight of the model."""
    fallbacks: tuple[str, ...]
    """Linears whose inputs the group size does not divide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What may change on resume: place and speed."""

    output: Path
    work_dir: Path
    device: str = "cpu"
    ram_bytes: int | None = None
    """Host memory the whole process may use; None is what the machine has free."""
    workers: int = 1
    """Threads that compute units, panels and tiles side by side (CPU only)."""
    units_in_flight: int = 0
    """Units between two barriers of a pass; 0 lets the planner choose."""
    allow_device_change: bool = False
    """Go on although another kind of device gives other bits; the output says so."""
    restart: bool = False
    keep_work: bool = False

    def __post_init__(self) -> None:
        _require(1 <= self.workers <= 1024, "threads", self.workers, "1 to 1024")
        _require(
            0 <= self.units_in_flight <= 4096,
            "batch",
            self.units_in_flight,
            "0 (automatic) to 4096",
        )


def _require(holds: bool, option: str, got: object, wanted: str) -> None:
    if not holds:
        raise UsageError(f"--{option} must be {wanted}, not {got}")


def _one_of(names: tuple[str, ...]) -> str:
    return "one of " + ", ".join(names)
