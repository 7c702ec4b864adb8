"""Token windows, and expanded windows.

Windows are random runs of ``sequence_length`` tokens of the joined text, chosen
by the seed. Expansion (RSQ, section 4.4) adds copies rolled by m floor(L / M)
tokens; they exist only as indices until they are embedded.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rsq_stream.calibration.long_text import tokens_of
from rsq_stream.errors import CalibrationError


@dataclass(frozen=True)
class Windows:
    """Calibration windows and their rolled copies."""

    window_BT: Int[Tensor, "B T"]
    expand: int

    @property
    def sequences(self) -> int:
        """Sequences, rolled copies included."""
        return self.window_BT.shape[0] * self.expand

    @property
    def sha256(self) -> str:
        """Hash of the tokens and of the expansion."""
        digest = hashlib.sha256(f"{list(self.window_BT.shape)} {self.expand}".encode())
        digest.update(self.window_BT.to(torch.int32).contiguous().numpy().data)
        return digest.hexdigest()

    def tokens(self, first: int, count: int) -> Int[Tensor, "B T"]:
        """Return sequences ``first`` to ``first + count - 1``.

        Sequence n M + m is window n, rolled right by m floor(T / M) tokens.
        """
        step = self.window_BT.shape[1] // self.expand
        rows = [
            self.window_BT[index // self.expand].roll(index % self.expand * step)
            for index in range(first, min(first + count, self.sequences))
        ]
        return torch.stack(rows)


def choose_windows(
    text: str,
    tokenizer: Callable[..., Any],
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    where: str,
) -> Int[Tensor, "B T"]:
    """Tokenize the text once and take random windows of it, by the seed.

    Raises
    ------
    CalibrationError
        The text is shorter than one window.
    """
    # In int32: they are kept to the end of a run.
    token_T = tokens_of(text, tokenizer)
    spare = len(token_T) - sequence_length
    if spare < 0:
        raise CalibrationError(
            f"{where}: {len(token_T)} tokens, but one window needs {sequence_length};"
            " give more text or a smaller --sequence-length"
        )
    chooser = random.Random(seed)
    starts = [chooser.randint(0, spare) for _ in range(samples)]
    # At once: a tensor for each window would take as much as a short window.
    return token_T.unfold(0, sequence_length, 1)[torch.tensor(starts)]
