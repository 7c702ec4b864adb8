"""Checksums of what a run has written and will read again."""

import xxhash


class Checksum:
    """XXH3 of bytes that come in parts; 63 bits, as SQLite's integers have a sign."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def update(self, part: bytes | memoryview) -> None:
        """Take in the next part."""
        self._state.update(part)

    @property
    def value(self) -> int:
        """The checksum of all parts so far."""
        return self._state.intdigest() >> 1


def checksum(content: bytes | memoryview) -> int:
    """Return the checksum of bytes that are all there."""
    return int(xxhash.xxh3_64_intdigest(content)) >> 1
