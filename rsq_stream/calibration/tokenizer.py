"""A model's own tokenizer, by transformers: imported only where text is read."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rsq_stream.errors import CheckpointError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer; remote code is never run.

    Raises
    ------
    CheckpointError
        The folder holds no tokenizer that transformers knows.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{folder}: no usable tokenizer ({reason}); calibration text needs one"
        ) from error
    return tokenizer
