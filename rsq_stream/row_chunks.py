"""Embedding and head come in chunks of rows: how many rows to a chunk."""

CHUNK_BYTES = 16 << 20
"""A chunk of the embedding or head takes at most about this much in fp32."""
_CHUNK_ROWS = 8192
"""The rows of a chunk, where a row is not long."""
_WHOLE_ROWS = 32
"""Rows come by so many: packed along the rows, codes then fill whole words."""


def chunk_rows(width: int) -> int:
    """Give the rows of a chunk of the embedding or head; decides no byte."""
    fitting = min(_CHUNK_ROWS, CHUNK_BYTES // (4 * width))
    return max(_WHOLE_ROWS, fitting // _WHOLE_ROWS * _WHOLE_ROWS)
