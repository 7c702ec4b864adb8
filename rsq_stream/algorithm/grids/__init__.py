"""What codes stand for, one file a grid."""

from typing import TYPE_CHECKING

from rsq_stream.registry import Registry

if TYPE_CHECKING:
    from rsq_stream.algorithm.grids.base import Grid

GRIDS: "Registry[type[Grid]]" = Registry(
    "rsq_stream.algorithm.grids", "GRID", option="grid"
)
