"""Scale: how much each calibration token counts, one file a strategy."""

from typing import TYPE_CHECKING

from rsq_stream.registry import Registry

if TYPE_CHECKING:
    from rsq_stream.algorithm.importance.base import Strategy

STRATEGIES: "Registry[Strategy]" = Registry(
    "rsq_stream.algorithm.importance", "STRATEGY", option="importance"
)
"""Every strategy by the name of its file; to add one is to add a file."""
