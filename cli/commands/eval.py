"""``rsq-stream eval``: perplexity of a source or quantized model, block by block."""

import dataclasses
from typing import TYPE_CHECKING, Any

from ..display.progress import shown
from ..display.text import duration, facts, say, say_json
from ..options.activations import (
    ActivationBits,
    ActivationClip,
    ActivationGroupSize,
    ActivationSymmetric,
    KvBits,
    KvClip,
    KvSymmetric,
)
from ..options.common import (
    Against,
    Bos,
    Debug,
    Device,
    Json,
    MaxWindows,
    Model,
    Quiet,
    Sample,
    SampleTokens,
    Text,
    Threads,
    WindowLength,
)

if TYPE_CHECKING:
    from rsq_stream.config.activations import ActivationRounding
    from rsq_stream.evaluation.result import Evaluated


def evaluate_model(
    model: Model,
    *,
    text: Text,
    sequence_length: WindowLength = None,
    max_windows: MaxWindows = None,
    bos: Bos = False,
    against: Against = None,
    sample: Sample = None,
    sample_tokens: SampleTokens = 32,
    activation_bits: ActivationBits = None,
    activation_group_size: ActivationGroupSize = None,
    activation_symmetric: ActivationSymmetric = None,
    activation_clip: ActivationClip = None,
    kv_bits: KvBits = None,
    kv_symmetric: KvSymmetric = None,
    kv_clip: KvClip = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure how well a model predicts a text, and how far it is from another.

    Rounded activations are simulated: as the folder was calibrated, or as given here.
    """
    del debug
    given = {
        "activation_bits": activation_bits,
        "activation_group_size": activation_group_size,
        "activation_symmetric": activation_symmetric,
        "activation_clip": activation_clip,
        "kv_bits": kv_bits,
        "kv_symmetric": kv_symmetric,
        "kv_clip": kv_clip,
    }
    from rsq_stream import api

    with shown(silent=quiet or as_json) as listener:
        evaluated = api.evaluate(
            model,
            text,
            against=against,
            sequence_length=sequence_length,
            max_windows=max_windows,
            bos=bos,
            activations=given,
            sample=sample,
            sample_tokens=sample_tokens,
            device=device,
            threads=threads,
            listener=listener,
        )
    result = as_object(model, text, evaluated)
    if as_json:
        say_json(result)
        return
    rows = _rows(result, against)
    rows |= _simulated(evaluated.simulated, evaluated.calibrated_for)
    its_own = evaluated.against
    if its_own is not None and its_own.rounds_activations:
        rows["simulated of it"] = its_own.activations_text()
    say(facts(rows))
    if sample is not None:
        say(f"\n{evaluated.sample}")


def as_object(model: str, text: str, evaluated: "Evaluated") -> dict[str, Any]:
    """Return an evaluation as JSON takes it."""
    return {
        "model": model,
        "text": text,
        "sequence_length": evaluated.sequence_length,
        **dataclasses.asdict(evaluated.evaluation),
        "simulated": dataclasses.asdict(evaluated.simulated),
        "as_calibrated": evaluated.simulated == evaluated.calibrated_for,
        **({} if evaluated.sample is None else {"sample": evaluated.sample}),
    }


def _simulated(
    scheme: "ActivationRounding", made_for: "ActivationRounding"
) -> dict[str, str]:
    """Say which activations were rounded, and whether the folder asks for that."""
    if not scheme.rounds_activations and not made_for.rounds_activations:
        return {}
    text = scheme.activations_text()
    if scheme == made_for:
        text += " (as the model was calibrated)"
    elif made_for.rounds_activations:
        text += f" (the model was calibrated for: {made_for.activations_text()})"
    return {"simulated": text}


def _rows(result: dict[str, Any], against: str | None) -> dict[str, str]:
    rows = {
        "model": result["model"],
        "perplexity": f"{result['perplexity']:.4f}",
        "loss": f"{result['loss']:.5f} nats per token",
        "text": f"{result['text']}: {result['windows']} windows of"
        f" {result['sequence_length']} tokens",
    }
    if against is not None:
        rows["against"] = f"{against}: perplexity {result['against_perplexity']:.4f}"
        rows["KL divergence"] = f"{result['kl_divergence']:.6f} nats per token"
    rows["time"] = duration(result["seconds"])
    return rows
