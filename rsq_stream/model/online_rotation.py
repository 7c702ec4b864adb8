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

KEY = "online_rotations"
"""Where config.json has them, in its ``quantization_config``."""
_STREAM_OF_SIGNS = {"heads": 2 << 32, "mlp": 3 << 32}
"""Added to the plan's seed, so that equal sizes do not get equal rotations."""
_ACROSS = {"heads": "across heads", "mlp": "all inputs"}


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


def rotated_linears(architecture: Architecture) -> dict[str, str]:
    """Return the linears whose inputs may be rotated, by kind (``heads``, ``mlp``).

    They are named as config.json has them: by their names in a block.
    """
    return {
        linear.online_rotation: name
        for block in architecture.kinds
        for name, linear in architecture.linears(block).items()
        if linear.online_rotation
    }


def _sizes(architecture: Architecture) -> dict[str, int]:
    return {"heads": architecture.heads, "mlp": architecture.mlp_width}


def planned_rotations(
    plan: QuantizationPlan, architecture: Architecture
) -> OnlineRotations:
    """Build the online rotations that a plan names."""
    sizes = _sizes(architecture)
    names = {"heads": plan.heads_rotation, "mlp": plan.mlp_rotation}
    rotations = {
        kind: make_rotation(name, sizes[kind], _seed(plan, kind))
        for kind, name in names.items()
        if name != "none"
    }
    return OnlineRotations(**rotations)


def _seed(plan: QuantizationPlan, kind: str) -> int:
    return plan.seed + _STREAM_OF_SIGNS[kind]


def written_rotations(
    plan: QuantizationPlan, architecture: Architecture
) -> dict[str, Any]:
    """Describe for config.json, by linear, the rotations that a plan leaves undone."""
    online = planned_rotations(plan, architecture)
    linears = rotated_linears(architecture)
    return {
        linears[kind]: {
            "rotation": rotation.name,
            "size": rotation.size,
            "seed": _seed(plan, kind),
            "applied": _ACROSS[kind],
            "fingerprint": rotation.fingerprint(),
        }
        for kind, rotation in (("heads", online.heads), ("mlp", online.mlp))
        if rotation is not None
    }


def read_rotations(
    config: Mapping[str, Any], architecture: Architecture, where: str
) -> OnlineRotations:
    """Build the rotations that a config.json asks for, if it asks for any.

    Raises
    ------
    UnsupportedModelError
        It asks for what this tool does not write, or cannot build alike.
    """
    written = (config.get("quantization_config") or {}).get(KEY)
    if written is None:
        return NO_ROTATIONS
    linears, sizes = rotated_linears(architecture), _sizes(architecture)
    kinds = {linear: kind for kind, linear in linears.items()}
    if not isinstance(written, Mapping) or not 0 < len(written) == len(
        written.keys() & kinds.keys()
    ):
        raise UnsupportedModelError(
            f"{where}: {KEY} must be of {' or '.join(kinds)}, as this tool writes them"
        )
    rotations = {
        kind: _read(written[linear], kind, sizes[kind], f"{where}: {KEY} of {linear}")
        for linear, kind in kinds.items()
        if linear in written
    }
    return OnlineRotations(**rotations)


def _read(written: Any, kind: str, size: int, where: str) -> Rotation:
    try:
        known = (written["size"], written["applied"]) == (size, _ACROSS[kind])
        name, seed = written["rotation"], written["seed"]
        known = known and name == rotation_name(size)
        rotation = make_rotation(name, size, seed) if known else None
        apart = abs(rotation.fingerprint() - written["fingerprint"]) if rotation else 0
    except (KeyError, RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{where} is not as this tool writes it ({error})"
        ) from error
    if rotation is None:
        raise UnsupportedModelError(
            f"{where} must be {rotation_name(size)} of size {size},"
            f" {_ACROSS[kind]}, not {written}"
        )
    if not apart <= 1e-4:
        raise UnsupportedModelError(
            f"{where}: {name} of seed {seed} has the fingerprint"
            f" {rotation.fingerprint()} here, not {written['fingerprint']}; another"
            " version of torch made it"
        )
    return rotation
