"""Plan fields that name each rotation, as ``Rotation.name`` does."""

from dataclasses import dataclass

from rsq_stream.config.schemes import COMPRESSED_TENSORS, GRID_FORMAT
from rsq_stream.errors import require

_MARKED_FORMATS = (COMPRESSED_TENSORS, GRID_FORMAT)
"""The layouts that can say that other loaders must refuse them."""


@dataclass(frozen=True, kw_only=True)
class RotationFields:
    """Rotations: those folded into weights, and those done while the model runs."""

    __slots__ = ()

    residual_rotation: str
    """R1, as ``Rotation.name`` gives it, or ``none``."""
    value_rotation: str
    """R2, per value head, or ``none``."""
    heads_rotation: str = "none"
    """Of o's input across the heads, done while the model runs, or ``none``."""
    mlp_rotation: str = "none"
    """R4, of down's input, done while the model runs, or ``none``."""

    def check_rotations(self, output_format: str) -> None:
        """Refuse a rotation that is left to be done where nothing would say so.

        Raises
        ------
        UsageError
            The residual stream is not rotated, or the format cannot be marked.
        """
        if not self.rotates_online:
            return
        folded = "none" not in (self.residual_rotation, self.value_rotation)
        wanted = "portable or none where the residual stream is not rotated"
        require(folded, "rotation", "full", wanted)
        known = output_format in _MARKED_FORMATS
        wanted = f"portable or none for {output_format}, which cannot say what is"
        require(known, "rotation", "full", f"{wanted} left to be done at inference")

    @property
    def rotates_online(self) -> bool:
        """Whether a rotation is left to be done while the model runs."""
        return not self.heads_rotation == self.mlp_rotation == "none"
