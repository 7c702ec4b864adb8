"""Rotations that stay to be done while a model runs, on the inputs of o and down.

With ``--rotation full`` o's input is mixed across the heads (beside R2 that is a
rotation of all of it, Q_heads kron R), and down's input over the whole MLP width; the
weights of both have the inverse folded in. A rotation is named in the plan and in the
output's config.json by its form and seed: ``algorithm/rotation/rotation.py`` builds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsq_stream.algorithm.rotation.rotation import (
    Rotation,
    make_rotation,
    rotation_name,
)
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import UnsupportedModelError
from rsq_stream.model.architecture import Architecture

HEADS, MLP = "self_attn.o_proj", "mlp.down_proj"
"""The linears whose inputs are rotated, by their names in a block."""
KEY = "online_rotations"
"""Where config.json has them, in its ``quantization_config``."""
_STREAM_OF_SIGNS = {HEADS: 2 << 32, MLP: 3 << 32}
"""Added to the plan's seed, so that equal sizes do not get equal rotations."""
_ACROSS = {HEADS: "across heads", MLP: "all inputs"}


@dataclass(frozen=True)
class OnlineRotations:
    """What is applied to the inputs of o and down; nothing where there is None."""

    heads: Rotation | None = None
    mlp: Rotation | None = None

    def of_attention(self, c_BTI: Tensor) -> Tensor:
        """Mix o's input across the heads; computed in fp32 or better."""
        if self.heads is None:
            return c_BTI
        c_LI = _wide(c_BTI).reshape(-1, c_BTI.shape[-1])
        return self.heads.apply_across_heads(c_LI).reshape(c_BTI.shape).to(c_BTI)

    def of_mlp(self, u_BTI: Tensor) -> Tensor:
        """Rotate down's input; computed in fp32 or better."""
        if self.mlp is None:
            return u_BTI
        u_LI = _wide(u_BTI).reshape(-1, u_BTI.shape[-1])
        return self.mlp.apply(u_LI).reshape(u_BTI.shape).to(u_BTI)


NO_ROTATIONS = OnlineRotations()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def planned_rotations(
    plan: QuantizationPlan, architecture: Architecture
) -> OnlineRotations:
    """Build what a plan names."""
    sizes = {HEADS: architecture.heads, MLP: architecture.mlp_width}
    names = {HEADS: plan.heads_rotation, MLP: plan.mlp_rotation}
    made = {
        linear: make_rotation(name, sizes[linear], _seed(plan, linear))
        for linear, name in names.items()
        if name != "none"
    }
    return OnlineRotations(made.get(HEADS), made.get(MLP))


def _seed(plan: QuantizationPlan, linear: str) -> int:
    return plan.seed + _STREAM_OF_SIGNS[linear]


def written_rotations(
    plan: QuantizationPlan, architecture: Architecture
) -> dict[str, Any]:
    """Say in config.json what a plan leaves to be done, by linear."""
    online = planned_rotations(plan, architecture)
    return {
        linear: {
            "rotation": rotation.name,
            "size": rotation.size,
            "seed": _seed(plan, linear),
            "applied": _ACROSS[linear],
            "fingerprint": rotation.fingerprint(),
        }
        for linear, rotation in ((HEADS, online.heads), (MLP, online.mlp))
        if rotation is not None
    }


def read_rotations(
    config: Mapping[str, Any], architecture: Architecture, where: str
) -> OnlineRotations:
    """Build what a config.json asks for; nothing where it asks for nothing.

    Raises
    ------
    UnsupportedModelError
        It asks for what this tool does not write, or cannot build alike.
    """
    written = (config.get("quantization_config") or {}).get(KEY)
    if written is None:
        return NO_ROTATIONS
    sizes = {HEADS: architecture.heads, MLP: architecture.mlp_width}
    if not isinstance(written, Mapping) or not 0 < len(written) == len(
        written.keys() & sizes.keys()
    ):
        raise UnsupportedModelError(
            f"{where}: {KEY} must be of {HEADS} or {MLP}, as this tool writes them"
        )
    made = {
        linear: _read(written[linear], linear, sizes[linear], where)
        for linear in written
    }
    return OnlineRotations(made.get(HEADS), made.get(MLP))


def _read(written: Any, linear: str, size: int, where: str) -> Rotation:
    try:
        known = (written["size"], written["applied"]) == (size, _ACROSS[linear])
        name, seed = written["rotation"], written["seed"]
        known = known and name == rotation_name(size)
        rotation = make_rotation(name, size, seed) if known else None
        apart = abs(rotation.fingerprint() - written["fingerprint"]) if rotation else 0
    except (KeyError, RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{where}: {KEY} of {linear} is not as this tool writes it ({error})"
        ) from error
    if rotation is None:
        raise UnsupportedModelError(
            f"{where}: {KEY} of {linear} must be {rotation_name(size)} of size {size},"
            f" {_ACROSS[linear]}, not {written}"
        )
    if not apart <= 1e-4:
        raise UnsupportedModelError(
            f"{where}: {KEY} of {linear}: {name} of seed {seed} has the fingerprint"
            f" {rotation.fingerprint()} here, not {written['fingerprint']}; another"
            " version of torch made it"
        )
    return rotation
