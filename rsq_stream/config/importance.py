"""The fields of a plan that say how much each calibration token counts."""

from dataclasses import dataclass

from rsq_stream.errors import one_of, require

IMPORTANCES = (
    "attncon",
    "actnorm",
    "actnorm-output",
    "actdiff",
    "tokensim",
    "tokenfreq",
    "cluster",
    "first-n",
    "first-last-n",
    "chunks",
    "uniform",
)
HARD = ("first-n", "first-last-n", "chunks", "uniform")
"""Tokens weigh 1 or 0 by their place: there are no scores to map."""
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOGETHER = (ROLES[:3], ROLES[3:4], ROLES[4:6], ROLES[6:])
"""Linears that share an input, and so one Hessian."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceFields:
    """How much each token counts (``algorithm/importance/_weighting.py``)."""

    importance: str
    """One of ``IMPORTANCES``."""
    importance_min: float
    importance_max: float
    importance_tokens: int = 0
    """N of ``first-n`` and ``first-last-n``; 0 elsewhere."""
    importance_chunks: str = ""
    """``C,C,.../T`` of ``chunks``: which of T equal parts of a window count."""
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
        """Refuse what is out of bounds, or has no effect.

        Raises
        ------
        UsageError
            The first such field, by its option.
        """
        kind = self.importance
        require(kind in IMPORTANCES, "importance", kind, one_of(IMPORTANCES))
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
        if kind in ("first-n", "first-last-n"):
            require(
                1 <= self.importance_tokens <= sequence_length,
                "importance-tokens",
                self.importance_tokens,
                f"1 to the sequence length ({sequence_length})",
            )
        if kind == "chunks":
            self.kept_ranges(sequence_length)
        self._check_shape(sequence_length)
        self._check_linears()

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

    def _check_linears(self) -> None:
        named = set(self.importance_linears)
        for role in self.importance_linears:
            require(role in ROLES, "importance-linears", role, one_of(ROLES))
        for together in TOGETHER:
            whole = not 0 < len(named.intersection(together)) < len(together)
            wanted = f"all or none of {', '.join(together)}: they share a Hessian"
            require(whole, "importance-linears", " ".join(sorted(named)), wanted)

    def weighs(self, linear: str) -> bool:
        """Whether the Hessian of a linear, by its name in the block, is weighted."""
        role = linear.rpartition(".")[2]
        return not self.importance_linears or role in self.importance_linears

    def kept_ranges(self, sequence_length: int) -> list[tuple[int, int]]:
        """Give the tokens that count, start and end, where their place decides.

        Raises
        ------
        UsageError
            The chunks are not of that form, or there are none of that number.
        """
        kind, count, length = self.importance, self.importance_tokens, sequence_length
        if kind == "first-n":
            return [(0, count)]
        if kind == "first-last-n":
            return [(0, count), (max(0, length - count), length)]
        if kind == "uniform":
            return [(0, length)]
        text = self.importance_chunks
        chosen, slash, parts = text.partition("/")
        numbers = [*chosen.split(","), parts]
        digits = all(number.isascii() and number.isdigit() for number in numbers)
        sound = bool(slash) and digits and max(map(len, numbers)) < 8
        total = int(parts) if sound else 0
        chunks = [int(number) for number in numbers[:-1]] if sound else []
        sound = 1 <= total <= length and all(chunk < total for chunk in chunks)
        wanted = f"C,C,.../T with C below T and T at most {length}, such as 0,7/8"
        require(sound, "importance-chunks", text or "nothing", wanted)
        return [(c * length // total, (c + 1) * length // total) for c in chunks]
