"""What an evaluation finds, and what its text has to be; imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from rsq_stream.config.activations import ActivationRounding
from rsq_stream.errors import CalibrationError

_ENDINGS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a text says of a model."""

    perplexity: float
    """exp of the mean loss of tokens 2 .. T of each window."""
    loss: float
    tokens: int
    """Tokens that were predicted."""
    windows: int
    seconds: float
    kl_divergence: float | None = None
    """Mean of KL(other || model) per predicted token, in nats."""
    against_perplexity: float | None = None
    """Perplexity of the other model on the same windows."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a text says of a model, and how the model was served."""

    evaluation: Evaluation
    sequence_length: int
    """Tokens of a window."""
    simulated: ActivationRounding
    """The activations that were rounded."""
    calibrated_for: ActivationRounding
    against: ActivationRounding | None
    """The activations of the other model that were rounded."""
    sample: str | None
    """What the model writes after the prompt, if one was given."""


def require_text(text: str, option: str = "--text") -> None:
    """Refuse an evaluation text that is no file, or not of a known kind.

    Errors name the file as the value of ``option``.

    Raises
    ------
    CalibrationError
        It is one or the other.
    """
    path = Path(text)
    if not path.is_file():
        raise CalibrationError(f"{option} {text}: no such file")
    if path.suffix not in _ENDINGS:
        wanted = ", ".join(_ENDINGS)
        raise CalibrationError(f"{option} {text}: must end in one of {wanted}")
