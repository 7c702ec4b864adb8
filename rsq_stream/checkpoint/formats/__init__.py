"""How an output is stored, one file a format."""

from typing import TYPE_CHECKING

from rsq_stream.registry import Registry

if TYPE_CHECKING:
    from rsq_stream.checkpoint.formats.base import Format

FORMATS: "Registry[Format]" = Registry(
    "rsq_stream.checkpoint.formats", "FORMAT", option="format"
)
