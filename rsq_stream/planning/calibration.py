"""The calibration windows of a plan, from the text that its user named."""

from rsq_stream.calibration.text import read_text
from rsq_stream.calibration.windows import Windows, choose_windows
from rsq_stream.checkpoint.opening import tokenizer_of
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.runtime.host_memory import trim_heap


def calibration_windows(
    calibration: str, plan: QuantizationPlan, checkpoint: Checkpoint
) -> Windows:
    """Read a calibration text, a data set's name or a file, and choose its windows."""
    text = read_text(calibration, plan.seed)
    window_BT = choose_windows(
        text,
        tokenizer_of(checkpoint),
        samples=plan.samples,
        sequence_length=plan.sequence_length,
        seed=plan.seed,
        where=calibration,
    )
    # The text and what the tokenizer took would lie in the heap's way of the run.
    del text
    trim_heap()
    return Windows(window_BT, plan.expand)
