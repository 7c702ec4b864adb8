"""The first N tokens and the last N alone (First&Last-N)."""

from rsq_stream.algorithm.importance.base import Options, Ranges, Strategy


def ranges(options: Options, sequence_length: int) -> Ranges:
    """Return the first N tokens and the last N, which may overlap."""
    count = options.importance_tokens
    return [(0, count), (max(0, sequence_length - count), sequence_length)]


STRATEGY = Strategy(
    help="the first and the last tokens alone", ranges=ranges, tokens_share=1 / 8
)
