"""Quantize decoder LLMs that do not fit the machine, one block at a time.

``api.py`` has all that the command line does. The package imports nothing heavy by
itself, because ``rsq-stream --help`` must answer before torch could be loaded: the
functions are looked up, and torch imported, when they are asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rsq_stream.config.quantization_plan import QuantizationPlan as QuantizationPlan
from rsq_stream.config.run_options import RunOptions as RunOptions
from rsq_stream.config.settings import Settings as Settings
from rsq_stream.errors import RsqError as RsqError

if TYPE_CHECKING:
    from rsq_stream.api import choose_bits as choose_bits
    from rsq_stream.api import evaluate as evaluate
    from rsq_stream.api import plan as plan
    from rsq_stream.api import prepare as prepare
    from rsq_stream.api import quantize as quantize
    from rsq_stream.api import run_options as run_options
    from rsq_stream.api import verify as verify
    from rsq_stream.checkpoint.loading import load_model as load_model

__version__ = "0.1.0"

_FUNCTIONS = (
    "choose_bits",
    "evaluate",
    "load_model",
    "plan",
    "prepare",
    "quantize",
    "run_options",
    "verify",
)

__all__ = ["QuantizationPlan", "RsqError", "RunOptions", "Settings", "__version__"]
__all__ += _FUNCTIONS


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "checkpoint.loading" if name == "load_model" else "api"
    return getattr(importlib.import_module(f"rsq_stream.{room}"), name)
