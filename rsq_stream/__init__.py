"""Quantize decoder LLMs that do not fit the machine, one block at a time.

The package imports nothing heavy by itself: ``rsq-stream --help`` must answer
before torch could be loaded. The pipeline is ``rsq_stream.pipeline.quantize``;
``load_model`` is looked up, and torch imported, when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from rsq_stream.config.quantization_plan import QuantizationPlan as QuantizationPlan
from rsq_stream.config.run_options import RunOptions as RunOptions
from rsq_stream.errors import RsqError as RsqError

if TYPE_CHECKING:
    from rsq_stream.checkpoint.loading import load_model as load_model

__version__ = "0.1.0"

__all__ = ["QuantizationPlan", "RsqError", "RunOptions", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rsq_stream.checkpoint.loading import load_model

    return load_model
