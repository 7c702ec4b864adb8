"""``rsq-stream eval``: perplexity of a source or quantized model, block by block."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsq_stream.errors import CalibrationError, UsageError
from rsq_stream.events import Event, Listener, RunStarted, StageStarted, UnitsDone

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
from ..options.resolve import open_checkpoint, pick_device, pick_workers, tokenizer_of

if TYPE_CHECKING:
    from rsq_stream.checkpoint.shards import Checkpoint
    from rsq_stream.config.activations import ActivationScheme

_LONGEST = 2048
_ENDINGS = (".txt", ".jsonl", ".parquet")


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
    require_text(text)
    for option, value in (
        ("--sequence-length", sequence_length),
        ("--max-windows", max_windows),
        ("--sample-tokens", sample_tokens),
        ("--threads", threads),
    ):
        least = 2 if option == "--sequence-length" else 1
        if value is not None and value < least:
            raise UsageError(f"{option} must be {least} or more, not {value}")
    place = pick_device(device)
    checkpoint = open_checkpoint(model)
    other = open_checkpoint(against) if against is not None else None

    from rsq_stream.calibration.text import read_text
    from rsq_stream.checkpoint.manifest import served_scheme
    from rsq_stream.evaluation.generation import greedy_sample
    from rsq_stream.evaluation.perplexity import evaluate, evaluation_windows

    made_for = served_scheme(checkpoint)
    scheme = made_for.changed(given)
    length = window_length(checkpoint, sequence_length)
    window_BT = evaluation_windows(
        read_text(text, 0, "--text"),
        tokenizer_of(checkpoint),
        length,
        bos=bos,
        max_windows=max_windows,
        where=text,
    )
    with shown(silent=quiet or as_json) as listener:
        models = [checkpoint, other] if other else [checkpoint]
        found = evaluate(
            checkpoint,
            window_BT,
            against=other,
            scheme=scheme,
            workers=pick_workers(threads, place),
            device=place,
            listener=_in_sequence(listener, models),
        )
    result: dict[str, Any] = {"model": model, "text": text, "sequence_length": length}
    result |= dataclasses.asdict(found)
    result["simulated"] = dataclasses.asdict(scheme)
    result["as_calibrated"] = scheme == made_for
    if sample is not None:
        result["sample"] = greedy_sample(
            checkpoint, sample, sample_tokens, scheme=scheme, device=place
        )
    if as_json:
        say_json(result)
    else:
        rows = _rows(result, against) | _simulated(scheme, made_for)
        if other is not None and (its_own := served_scheme(other)).rounds_activations:
            rows["simulated of it"] = its_own.activations_text()
        say(facts(rows))
        if sample is not None:
            say(f"\n{result['sample']}")


def require_text(text: str, option: str = "--text") -> None:
    """Refuse an evaluation text that is no file, or not of a known kind.

    Errors name the file as the value of ``option``.

    Raises
    ------
    CalibrationError
        It is one or the other.
    """
    path = Path(text)
    if not path.is_file():
        raise CalibrationError(f"{option} {text}: no such file")
    if path.suffix not in _ENDINGS:
        wanted = ", ".join(_ENDINGS)
        raise CalibrationError(f"{option} {text}: must end in one of {wanted}")


def window_length(checkpoint: "Checkpoint", wanted: int | None) -> int:
    """Give the tokens per window: as asked, else 2048 or the model's limit."""
    return wanted or min(_LONGEST, _architecture(checkpoint).longest)


def _architecture(checkpoint: "Checkpoint") -> Any:
    from rsq_stream.model.architecture import read_architecture

    return read_architecture(checkpoint.config, checkpoint.files.where)


def _in_sequence(listener: Listener, models: "list[Checkpoint]") -> Listener:
    """Count the blocks of all models on: evaluation begins again with each model."""
    listener(
        RunStarted(
            blocks=sum(_architecture(model).blocks for model in models),
            first_block=0,
            tokens=0,
        )
    )
    block = -1

    def listen(event: Event) -> None:
        nonlocal block
        block += isinstance(event, StageStarted)
        if isinstance(event, StageStarted | UnitsDone):
            event = dataclasses.replace(event, block=block)
        listener(event)

    return listen


def _simulated(
    scheme: "ActivationScheme", made_for: "ActivationScheme"
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
