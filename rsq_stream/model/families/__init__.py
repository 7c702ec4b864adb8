"""The families of decoders that are supported, one file each."""

from rsq_stream.model.families.base import Family
from rsq_stream.registry import Registry

FAMILIES: Registry[Family] = Registry(
    "rsq_stream.model.families", "FAMILY", option="model", dashes=False
)
"""By ``model_type`` of config.json."""
