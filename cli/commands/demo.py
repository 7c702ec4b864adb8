"""``rsq-stream demo``: the bundled model, quantized by every method and compared."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..display.text import duration, remark, say, say_json, table
from ..options.common import Debug, DemoBits, DemoOutput, DemoSamples, Json, Quiet
from ..options.quantize_options import QuantizeOptions
from ..options.resolve import prepare

METHODS = ("rtn", "gptq", "quarot", "rsq")
_BITS = (3, 2)
_GROUP_SIZES = {2: 64}
"""Group sizes by bits; one scale a row for all others."""
_TOKENS = 512
"""Per window, of calibration and of evaluation: the model's limit."""
_WINDOWS = 48
"""About as many windows of the held-out text are predicted, spread over all of it."""
_PROMPT = "def __init__(self"
_SAMPLE_TOKENS = 24
_MEANING = """\
Perplexity: how many tokens the model hesitates between, on text it has never seen;
lower is better, the source is the floor. Bits per weight count all that is stored:
rotated models keep a head beside the embedding, which weighs on one this small."""


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One line of the table."""

    method: str
    bits: int | None
    group_size: int | None
    perplexity: float
    bytes: int
    bits_per_weight: float
    seconds: float | None
    sample: str


def demo(
    *,
    bits: DemoBits = None,
    samples: DemoSamples = 48,
    output: DemoOutput = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize the bundled model with every method; show before and after."""
    del debug
    began = time.monotonic()
    lines: list[DemoRow] = []
    with _folder(output) as folder:
        for line in _measured(folder, bits or list(_BITS), samples):
            lines.append(line)
            if not quiet and not as_json:
                done = f"{line.method} {line.bits or ''}".strip()
                remark("done", f"{done}: perplexity {line.perplexity:.3f}")
    if as_json:
        say_json({"lines": [asdict(line) for line in lines]})
        return
    say(table(_HEAD, map(_cells, lines)))
    say(f"\n{_MEANING}\n")
    say(f"Each model goes on from {_PROMPT!r}:")
    for line in lines:
        name = f"{line.method} {line.bits}" if line.bits else line.method
        say(f"  {name:<9} {line.sample!r}")
    kept = f"; the models are in {output}" if output else ""
    say(f"\n{duration(time.monotonic() - began)} in all{kept}")


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="rsq-stream-demo-") as folder:
        yield Path(folder)


def _measured(folder: Path, all_bits: list[int], samples: int) -> Iterator[DemoRow]:
    """Return the source's line, then one per number of bits and method."""
    from rsq_stream.checkpoint.opening import open_checkpoint
    from rsq_stream.demo import CALIBRATION, MODEL
    from rsq_stream.pipeline.quantize import quantize

    source = open_checkpoint(str(MODEL))
    sizes = [entry.size_bytes for entry in source.tensors.values()]
    weights = sum(e.size_bytes // e.dtype.itemsize for e in source.tensors.values())
    perplexity, sample = _tried(MODEL)
    yield DemoRow(
        method="source",
        bits=None,
        group_size=None,
        perplexity=perplexity,
        bytes=sum(sizes),
        bits_per_weight=8 * sum(sizes) / weights,
        seconds=None,
        sample=sample,
    )
    for bits in all_bits:
        for method in METHODS:
            options = QuantizeOptions(
                method=method,
                bits=bits,
                group_size=_GROUP_SIZES.get(bits, -1),
                calibration=str(CALIBRATION),
                samples=samples,
                sequence_length=_TOKENS,
                output=folder / f"{method}-{bits}bit",
                device="cpu",
            )
            made = prepare(str(MODEL), options, read_calibration=True)
            summary = quantize(made)
            perplexity, sample = _tried(summary.output)
            yield DemoRow(
                method=method,
                bits=bits,
                group_size=options.group_size,
                perplexity=perplexity,
                bytes=made.execution.output_bytes,
                bits_per_weight=made.execution.bits_per_weight,
                seconds=summary.seconds,
                sample=sample,
            )


def _tried(folder: Path) -> tuple[float, str]:
    """Return a model's perplexity on the held-out text, and what it says."""
    from rsq_stream.calibration.text import read_text
    from rsq_stream.checkpoint.opening import open_checkpoint, tokenizer_of
    from rsq_stream.demo import HELD_OUT
    from rsq_stream.evaluation.generation import greedy_sample
    from rsq_stream.evaluation.perplexity import evaluate, evaluation_windows
    from rsq_stream.planning.devices import pick_workers

    checkpoint = open_checkpoint(str(folder))
    window_BT = evaluation_windows(
        read_text(str(HELD_OUT), 0),
        tokenizer_of(checkpoint),
        _TOKENS,
        bos=False,
        max_windows=None,
        where="held-out text",
    )
    window_BT = window_BT[:: max(1, len(window_BT) // _WINDOWS)]
    workers = pick_workers(None, "cpu")
    found = evaluate(checkpoint, window_BT, workers=workers, device="cpu")
    sample = greedy_sample(checkpoint, _PROMPT, _SAMPLE_TOKENS, device="cpu")
    return found.perplexity, sample.removeprefix(_PROMPT)


_HEAD = ("method", "bits", "group", "perplexity", "bytes", "bits/weight", "seconds")


def _cells(line: DemoRow) -> tuple[str, ...]:
    return (
        line.method,
        str(line.bits or ""),
        {None: "", -1: "row"}.get(line.group_size, str(line.group_size)),
        f"{line.perplexity:.3f}",
        f"{line.bytes:,}",
        f"{line.bits_per_weight:.2f}",
        "" if line.seconds is None else f"{line.seconds:.1f}",
    )
