"""The first N tokens alone (First-N)."""

from rsq_stream.algorithm.importance.base import Options, Ranges, Strategy


def ranges(options: Options, sequence_length: int) -> Ranges:
    """Return the first N tokens."""
    return [(0, options.importance_tokens)]


STRATEGY = Strategy(help="the first tokens alone", ranges=ranges, tokens_share=1 / 4)
