"""Which format a config.json names, and what it says of each linear."""

from collections.abc import Mapping
from typing import Any

from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.formats.base import Format
from rsq_stream.config.schemes import LM_HEAD_LINEAR, Scheme
from rsq_stream.errors import UnsupportedModelError
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.online_rotation import KEY


def format_of(config: Mapping[str, Any], where: str) -> Format | None:
    """Return the format that a config.json names; None if nothing is quantized.

    Raises
    ------
    UnsupportedModelError
        The checkpoint is quantized in another way than this tool writes.
    """
    quantization = config.get("quantization_config")
    if quantization is None or quantization.keys() == {"quant_method", KEY}:
        return None  # in the second case it is rotated
    for stored in FORMATS.values():
        if stored.recognizes(quantization):
            return stored
    raise _foreign(where, " or ".join(known.config_name for known in FORMATS.values()))


def schemes_of(
    config: Mapping[str, Any], architecture: Architecture, where: str
) -> dict[str, Scheme | None] | None:
    """Return each linear's scheme by its full name, None for one that is unquantized.

    For a model that is not quantized there is None in all. The head is among them.

    Raises
    ------
    UnsupportedModelError
        The checkpoint is quantized in another way than this tool writes.
    """
    stored = format_of(config, where)
    if stored is None:
        return None
    try:
        schemes = stored.schemes(config["quantization_config"], architecture)
    except (AttributeError, KeyError, TypeError, ValueError):
        schemes = {}
    if set(schemes) != {*architecture.model_linears(), LM_HEAD_LINEAR}:
        raise _foreign(where, stored.config_name)
    return schemes


def _foreign(where: str, names: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: its quantization_config is not {names} of the linears of its"
        " blocks, as this tool writes it"
    )
