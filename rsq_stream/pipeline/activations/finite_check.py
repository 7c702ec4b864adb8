"""NaN and infinity, named by block, sequence and token."""

import torch
from torch import Tensor

from rsq_stream.errors import NumericalError


def require_finite(
    x_BTI: Tensor, block: int, stage: str, first_sequence: int
) -> Tensor:
    """Return the tensor back, or name the first place that is NaN or infinite.

    Raises
    ------
    NumericalError
        With block, stage, sequence and token.
    """
    # A sum is one pass without a mask; only a bad one pays for the search.
    if not bool(torch.isfinite(x_BTI.float().sum())):
        bad = (~torch.isfinite(x_BTI)).nonzero()
        if len(bad):
            sequence, token = bad[0, :2].tolist()
            raise _not_finite(block, stage, first_sequence + sequence, token)
    return x_BTI


def _not_finite(block: int, stage: str, sequence: int, token: int) -> NumericalError:
    return NumericalError(
        f"block {block}, {stage}, sequence {sequence}, token {token}: the activations"
        " hold NaN or infinity; the source weights or their type cannot be right there"
    )


class FiniteWatch:
    """Sees that a pass's activations are finite, without a wait for each unit.

    On a GPU what it saw stays there, token by token, and is looked at once, at the end
    of the pass. Nothing that was made of bad activations is journalled before that.
    """

    def __init__(
        self,
        block: int,
        stage: str,
        *,
        sequences: int,
        tokens: int,
        device: torch.device,
    ) -> None:
        self._where = block, stage
        self._bad_BT: Tensor | None = None
        if not _looks_at_each_unit(device):
            size = sequences, tokens
            self._bad_BT = torch.zeros(size, dtype=torch.bool, device=device)

    def see(self, x_BTI: Tensor, first_sequence: int) -> Tensor:
        """Return the tensor back; on the CPU a bad one is refused at once.

        Raises
        ------
        NumericalError
            With block, stage, sequence and token.
        """
        if self._bad_BT is None:
            return require_finite(x_BTI, *self._where, first_sequence)
        rows = slice(first_sequence, first_sequence + x_BTI.shape[0])
        # Both are NaN where one value is; a sum could leave fp32 with none infinite.
        fine_BT = x_BTI.amax(-1).isfinite() & x_BTI.amin(-1).isfinite()
        self._bad_BT[rows] |= ~fine_BT  # one look at each stream
        return x_BTI

    def require(self) -> None:
        """Refuse the pass if it held anything bad.

        Raises
        ------
        NumericalError
            With block, stage, sequence and token of the first place.
        """
        if self._bad_BT is not None:
            bad = self._bad_BT.nonzero()
            if len(bad):
                sequence, token = bad[0].tolist()
                raise _not_finite(*self._where, sequence, token)


def _looks_at_each_unit(device: torch.device) -> bool:
    """Whether to refuse a bad unit at once; for a GPU each look is a wait."""
    return device.type != "cuda"
