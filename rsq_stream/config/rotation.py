"""Plan fields that name each rotation, as ``Rotation.name`` does."""

from dataclasses import dataclass

from rsq_stream.errors import require


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

    def check_rotations(self) -> None:
        """Refuse a full rotation of a residual stream that is not rotated.

        Raises
        ------
        UsageError
            The residual stream or the value heads are not rotated.
        """
        if not self.rotates_online:
            return
        folded = "none" not in (self.residual_rotation, self.value_rotation)
        wanted = "portable or none where the residual stream is not rotated"
        require(folded, "rotation", "full", wanted)

    @property
    def rotates_online(self) -> bool:
        """Whether a rotation is left to be done while the model runs."""
        return not self.heads_rotation == self.mlp_rotation == "none"
