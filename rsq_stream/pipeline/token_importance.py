"""How much each token of a unit counts, as a plan has it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.algorithm.importance._positions import chosen_tokens
from rsq_stream.algorithm.importance._weighting import Weighting, mean_one, rounded
from rsq_stream.algorithm.importance.base import Seen
from rsq_stream.calibration.windows import Windows
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.block import Block


@dataclass(frozen=True)
class TokenImportance:
    """The strategy of a plan; made once a run."""

    plan: QuantizationPlan
    windows: Windows
    count_V: Tensor | None
    """How often each token is in the calibration set, if the strategy needs it."""

    def weights(
        self, unit: int, block: Block, x_BTD: Tensor, a_BTD: Tensor
    ) -> Float[Tensor, "B T"]:
        """Return a unit's weights: mean 1 per sequence, in bf16 unless exact.

        ``x_BTD`` is the block's input, ``a_BTD`` that of its q, k, v; the block must
        hold the source's weights.
        """
        plan, strategy = self.plan, STRATEGIES[self.plan.importance]
        if strategy.score is None:
            assert strategy.ranges is not None
            kept = strategy.ranges(plan, plan.sequence_length)
            sequences, tokens = x_BTD.shape[0], x_BTD.shape[1]
            weight_BT = chosen_tokens(sequences, tokens, kept, x_BTD.device)
            weight_BT = mean_one(weight_BT)
            return weight_BT if plan.importance_exact else rounded(weight_BT)
        weighting = Weighting(
            minimum=plan.importance_min,
            maximum=plan.importance_max,
            power=plan.importance_power,
            visible=plan.importance_visible,
            transform=plan.importance_transform,
            quantile=plan.importance_quantile,
            skip=plan.importance_skip,
            mask=plan.importance_mask,
            truncate=plan.importance_truncate,
            bins=plan.importance_bins,
            reverse=plan.importance_reverse,
            exact=plan.importance_exact,
        )
        # Not blocking, so that a host that scored by itself does not wait for the GPU.
        return weighting.weights(
            strategy.score(self._seen(unit, block, x_BTD, a_BTD)).to(
                x_BTD.device, non_blocking=True
            )
        )

    def _seen(self, unit: int, block: Block, x_BTD: Tensor, a_BTD: Tensor) -> Seen:
        """Compute what the strategy needs, and no more."""
        needs = STRATEGIES[self.plan.importance].needs
        count, token_BT = self.plan.unit_sequences, None
        if "counts" in needs:
            token_BT = self.windows.tokens(unit * count, count)
        return Seen(
            x_BTD=x_BTD,
            attention_BT=block.column_sums(a_BTD) if "attention" in needs else None,
            output_BTD=block.forward(x_BTD) if "block_output" in needs else None,
            token_BT=token_BT,
            count_V=self.count_V,
        )


def make_importance(plan: QuantizationPlan, windows: Windows) -> TokenImportance:
    """Make the strategy of a plan, and count tokens if it needs the counts.

    Counts are those of the expanded set: each rolled copy has a window's tokens again.
    """
    counts = None
    if "counts" in STRATEGIES[plan.importance].needs:
        counts = windows.window_BT.flatten().bincount() * windows.expand
    return TokenImportance(plan, windows, counts)


class TokenWeights:
    """Importance of a block's tokens: one tensor, bf16 or for exact weights fp32.

    A tensor per unit would lie between what a pass allocates and gives back, and the
    heap would grow with every unit.
    """

    def __init__(self, weight_BT: Tensor, unit_sequences: int) -> None:
        """Take weights ``[sequences, tokens]``, those of a unit in a row."""
        self.weight_BT = weight_BT
        self._unit_sequences = unit_sequences

    def of_unit(self, unit: int) -> Float[Tensor, "T"]:
        """Return a unit's weights end to end, in fp32."""
        return self._rows(unit).float().reshape(-1)

    def put(self, unit: int, weight_BT: Float[Tensor, "B T"]) -> None:
        """Keep a unit's weights, which the type is exact for."""
        self._rows(unit).copy_(weight_BT)

    def _rows(self, unit: int) -> Tensor:
        first = unit * self._unit_sequences
        return self.weight_BT[first : first + self._unit_sequences]
