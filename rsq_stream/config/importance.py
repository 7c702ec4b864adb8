"""The fields of a plan that say how much each calibration token counts."""

from dataclasses import dataclass

from rsq_stream.errors import one_of, require


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceFields:
    """How much each token counts (``algorithm/importance/_weighting.py``)."""

    importance: str
    """A name among ``STRATEGIES`` (``algorithm/importance``)."""
    importance_min: float
    importance_max: float
    importance_tokens: int = 0
    """N of the strategies that keep N tokens, or N at each end; 0 elsewhere."""
    importance_chunks: str = ""
    """``C,C,.../T``: which of T equal parts of a window count; empty elsewhere."""
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
    """Weights are not rounded to bf16."""
    importance_linears: tuple[str, ...] = ()
    """Roles of the linears whose Hessian is weighted; empty for all."""

    def check_importance(self, sequence_length: int) -> None:
        """Refuse fields that are out of bounds whatever the strategy.

        ``planning/validate.py`` checks the options that depend on the strategy.

        Raises
        ------
        UsageError
            The first such field, by its option.
        """
        require(
            0 <= self.importance_min <= self.importance_max,
            "importance-min",
            self.importance_min,
            f"0 to importance-max ({self.importance_max})",
        )
        require(
            0 < self.importance_max < float("inf"),
            "importance-max",
            self.importance_max,
            "above 0 and finite",
        )
        self._check_shape(sequence_length)

    def _check_shape(self, sequence_length: int) -> None:
        power, visible = self.importance_power, self.importance_visible
        require(power in (1, 2), "importance-power", power, "1 or 2")
        kinds = ("no", "linear", "root")
        require(visible in kinds, "importance-visible", visible, one_of(kinds))
        kinds, transform = ("no", "log", "rank"), self.importance_transform
        require(transform in kinds, "importance-transform", transform, one_of(kinds))
        for name, below in (("quantile", 0.5), ("mask", 1.0), ("truncate", 1.0)):
            share = getattr(self, f"importance_{name}")
            wanted = f"0 to less than {below:g}"
            require(0 <= share < below, f"importance-{name}", share, wanted)
        most = sequence_length - 1
        for name in ("skip", "bins"):
            count = getattr(self, f"importance_{name}")
            require(0 <= count <= most, f"importance-{name}", count, f"0 to {most}")
        require(self.importance_bins != 1, "importance-bins", 1, "2 or more, or 0")

    def weighs(self, linear: str) -> bool:
        """Whether the Hessian of a linear, by its name in the block, is weighted."""
        role = linear.rpartition(".")[2]
        return not self.importance_linears or role in self.importance_linears
