"""Quantize decoder LLMs that do not fit the machine, one block at a time.

The package imports nothing heavy by itself: ``rsq-stream --help`` must answer
before torch could be loaded. The pipeline is ``rsq_stream.pipeline.quantize``.
"""

from rsq_stream.config import QuantizationPlan as QuantizationPlan
from rsq_stream.errors import RsqError as RsqError
from rsq_stream.execution import RunOptions as RunOptions

__version__ = "0.1.0"

__all__ = ["QuantizationPlan", "RsqError", "RunOptions", "__version__"]
