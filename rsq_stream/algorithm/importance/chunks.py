"""Some of the equal parts of a window alone (Chunks)."""

from rsq_stream.algorithm.importance.base import Options, Ranges, Strategy
from rsq_stream.errors import require


def ranges(options: Options, sequence_length: int) -> Ranges:
    """Return the parts that are named.

    Raises
    ------
    UsageError
        The chunks are not of that form, or there are none of that number.
    """
    text, length = options.importance_chunks, sequence_length
    chosen, slash, parts = text.partition("/")
    numbers = [*chosen.split(","), parts]
    digits = all(number.isascii() and number.isdigit() for number in numbers)
    sound = bool(slash) and digits and max(map(len, numbers)) < 8
    total = int(parts) if sound else 0
    chunks = [int(number) for number in numbers[:-1]] if sound else []
    sound = 1 <= total <= length and all(chunk < total for chunk in chunks)
    form = f"C,C,.../T with C below T and T at most {length}, such as 0,7/8"
    require(sound, "importance-chunks", text or "nothing", form)
    return [(c * length // total, (c + 1) * length // total) for c in chunks]


STRATEGY = Strategy(
    help="some parts of the window alone", ranges=ranges, takes_chunks=True
)
