"""All tokens count alike, as in GPTQ."""

from rsq_stream.algorithm.importance.base import Options, Ranges, Strategy


def ranges(options: Options, sequence_length: int) -> Ranges:
    """Return the whole sequence."""
    return [(0, sequence_length)]


STRATEGY = Strategy(help="all tokens alike", ranges=ranges)
