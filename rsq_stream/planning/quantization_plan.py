"""From the options of a job to the plan that decides the output's bytes.

Every default is filled in here; what depends on the machine's memory is the planner's.
"""

import dataclasses
from typing import TypeVar

import torch

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.algorithm.rotation.rotation import rotation_name
from rsq_stream.calibration.text import DATA_SETS
from rsq_stream.calibration.windows import Windows
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.activations import ActivationFields
from rsq_stream.config.importance import ImportanceFields
from rsq_stream.config.overrides import Override, parse_override, resolve
from rsq_stream.config.propagation import parse_share
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import LM_HEAD_LINEAR, UNQUANTIZED
from rsq_stream.config.settings import Settings
from rsq_stream.errors import UsageError, one_of, require
from rsq_stream.model.architecture import Architecture
from rsq_stream.planning.devices import device_kind
from rsq_stream.planning.validate import (
    linear_type,
    require_valid_format,
    require_valid_grid,
    require_valid_importance,
)

GPU_TILE_WEIGHTS = 1 << 27
"""Weights that a GPU solves together: with fewer it waits for launches, and each more
takes some 20 bytes."""
UNIT_TOKENS = 2048
"""A unit holds as many whole sequences as fit into this many tokens, at least one."""
Setting = TypeVar("Setting")
SHARD_BYTES = 4_000_000_000
DEFAULT_LONGEST = 4096
"""Default sequence length, where the model was made for as much."""
PROPAGATE, SWEEPS, REFIT, SHRINKAGE = 0.5, 2, True, 1.0
"""Defaults of rsq, which other methods do without; how they were found is in
benchmarks/RESULTS.md."""

_PASSED_ON = tuple(
    field.name
    for part in (ImportanceFields, ActivationFields)
    for field in dataclasses.fields(part)
    if field.default is not dataclasses.MISSING and field.name != "importance_tokens"
)
"""Settings that a plan has as they are given."""


def sequence_length_for(architecture: Architecture, wanted: int | None) -> int:
    """Return the sequence length: as asked, else 4096 or the model's limit."""
    if wanted is None:
        return min(DEFAULT_LONGEST, architecture.longest)
    if wanted > architecture.longest:
        raise UsageError(
            f"--sequence-length must be at most {architecture.longest}, the positions"
            f" this model was made for, not {wanted}"
        )
    return wanted


def host_tile_rows(width: int) -> int:
    """Return the rows that a CPU's thread solves together.

    Products of more rows are faster, and threads wait less for each other between the
    steps of a tile; with fewer rows there are tiles for all cores. So a square linear
    is eight tiles, within bounds.
    """
    return min(max(width // 8, 128), 512)


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    settings: Settings,
    windows: Windows | None,
    *,
    device: torch.device,
) -> QuantizationPlan:
    """Fill in every default and give the plan that decides the output's bytes.

    Raises
    ------
    UsageError
        A setting is out of bounds.
    """
    rotated = settings.method in ("rsq", "quarot", "rotate")
    if settings.rotation is not None:
        kinds, given = ("portable", "full", "none"), settings.rotation
        require(given in kinds, "rotation", given, one_of(kinds))
        rotated = given != "none"
    full = settings.rotation == "full"
    length = sequence_length_for(architecture, settings.sequence_length)
    importance = settings.importance or (
        "attncon" if settings.method == "rsq" else "uniform"
    )
    strategy = STRATEGIES[importance]
    tokens = settings.importance_tokens
    if tokens is None or not strategy.takes_tokens:
        tokens = strategy.default_tokens(length)
    minimum = settings.importance_min
    if minimum is None:
        # RSQ's best r_min times the sequence length is about 20 wherever the
        # authors' job files show it (0.02 at 1024, 0.01 at 2048, 0.005 at 4096).
        minimum = min(1.0, 20 / length) * settings.importance_max
    stored_type = linear_type(checkpoint, architecture)
    source_type = str(stored_type).removeprefix("torch.")
    calibrated = settings.method not in ("rtn", "rotate")
    ours = settings.method == "rsq"

    def chosen(given: Setting | None, usual: Setting, without: Setting) -> Setting:
        """Return a setting of the solver: as asked, by default what the method does."""
        if not calibrated:
            return without
        if given is not None:
            return given
        return usual if ours else without

    grid = GRIDS[settings.grid]
    # Of a file the tokens are hashed; its path decides nothing.
    calibration = settings.calibration if settings.calibration in DATA_SETS else "file"
    cuda = device.type == "cuda"
    plan = QuantizationPlan(
        source_sha256=checkpoint.headers_sha256,
        method=settings.method,
        bits=settings.usual_bits,
        group_size=settings.group_size,
        overrides=own_schemes(
            architecture, settings, tied=architecture.tied and not rotated
        ),
        grid=settings.grid,
        output_format=settings.output_format or grid.output_format,
        symmetric=settings.symmetric,
        signed_scales=settings.signed_scales is not False
        and settings.symmetric
        and grid.takes_signed_scales,
        group_scales=settings.group_scales,
        clip_exponent=settings.clip_exponent,
        clip_steps=settings.clip_steps,
        act_order=settings.act_order,
        sweeps=chosen(settings.sweeps, SWEEPS, 0),
        refit=chosen(settings.refit, REFIT, False),
        damping=settings.damping,
        shrinkage=chosen(settings.shrinkage, SHRINKAGE, 0.0),
        residual_rotation=rotation_name(architecture.width) if rotated else "none",
        value_rotation=rotation_name(architecture.head_width) if rotated else "none",
        heads_rotation=rotation_name(architecture.heads) if full else "none",
        mlp_rotation=rotation_name(architecture.mlp_width) if full else "none",
        importance=importance,
        importance_min=minimum,
        importance_max=settings.importance_max,
        importance_tokens=tokens,
        **{name: getattr(settings, name) for name in _PASSED_ON},
        calibration=calibration if calibrated else "none",
        windows_sha256=windows.sha256 if windows and calibrated else "",
        samples=settings.samples,
        sequence_length=length,
        expand=settings.expand,
        seed=settings.seed,
        propagate=chosen(settings.propagate, PROPAGATE, 0.0),
        propagate_overrides=own_shares(architecture, settings) if calibrated else (),
        residual_correction=settings.residual_correction,
        cache_type=settings.cache_type or source_type,
        compute_type=source_type if cuda else "float32",
        unit_sequences=max(1, UNIT_TOKENS // length),
        hessian_panel=2048 if cuda else 128,
        tile_columns=128,
        tile_rows=256 if cuda else host_tile_rows(architecture.width),
        tile_weights=GPU_TILE_WEIGHTS if cuda else 0,
        shard_bytes=SHARD_BYTES,
        device_kind=device_kind(device),
    )
    require_valid_importance(plan, architecture)
    plan.require_whole_groups(architecture.linear_inputs())
    require_valid_grid(plan)
    require_valid_format(plan, architecture)
    return plan


def own_schemes(
    architecture: Architecture, settings: Settings, *, tied: bool
) -> tuple[str, ...]:
    """Return the plan's lines for linears that are not as ``bits`` has it.

    Raises
    ------
    UsageError
        A pattern fits nothing; or the head is named and is the embedding.
    """
    names = _linears(architecture)
    lines = list(settings.overrides)
    if settings.head_bits != UNQUANTIZED:
        require(
            2 <= settings.head_bits <= 8,
            "head-bits",
            settings.head_bits,
            "2 to 8 or 16",
        )
        if tied:
            raise UsageError(
                f"--head-bits {settings.head_bits}: the head of this model is its"
                " embedding, and without a rotation it stays so; leave the option out"
            )
        lines.insert(0, f"{LM_HEAD_LINEAR}={settings.head_bits}")
    if not tied:
        names[LM_HEAD_LINEAR] = None
    others = None if settings.bpw is not None else Override(settings.usual_bits)
    usual = {LM_HEAD_LINEAR: Override(UNQUANTIZED)}
    return tuple(
        f"{name}={override}"
        for name, override in sorted(
            resolve("override", map(parse_override, lines), names).items()
        )
        if override != usual.get(name, others)
    )


def own_shares(architecture: Architecture, settings: Settings) -> tuple[str, ...]:
    """Return the plan's lines for linears with a share of propagation of their own.

    Raises
    ------
    UsageError
        A pattern fits nothing, or its share is none.
    """
    given = map(parse_share, settings.propagate_overrides)
    found = resolve("propagate-override", given, _linears(architecture))
    return tuple(f"{name}={share}" for name, share in sorted(found.items()))


def _linears(architecture: Architecture) -> dict[str, int | None]:
    """Return each linear of the blocks with its block."""
    return {name: block for name, (block, _) in architecture.model_linears().items()}
