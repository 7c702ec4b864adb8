"""``rsq-stream quantize``: the main job, resumable."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.events import LinearRecord

from ..display.bits import explained, require_free
from ..display.findings import notices_of, warnings_of
from ..display.forecast import compared, stage_table
from ..display.plan_table import as_object, show, warn_about_room
from ..display.progress import shown
from ..display.serving import serving_of, serving_rows
from ..display.text import duration, exact_size, facts, remark, say, say_aside, say_json
from ..options.common import Debug, DryRun, Json, Model, Quiet
from ..options.quantize_options import QuantizeOptions
from ..options.resolve import prepare
from ..signals import StopRequest

if TYPE_CHECKING:
    from rsq_stream.pipeline.job import Job, RunSummary


def quantize(
    model: Model,
    *,
    options: QuantizeOptions,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model; the same command goes on where a run stopped."""
    del debug
    made = prepare(model, options, read_calibration=True)
    silent = quiet or as_json
    if options.bpw is not None:
        from rsq_stream.api import choose_bits

        require_free(made)
        if not silent:
            remark("notice", "measuring what bits cost; then the run itself")
        with StopRequest() as stop, shown(silent=silent) as listener:
            made, choice = choose_bits(
                made, options.bpw, listener=listener, stop=stop.event
            )
        if not silent:
            say_aside(explained(made, choice))
    warn_about_room(made)
    if dry_run:
        show(made, as_json=as_json)
        return

    from rsq_stream.pipeline.quantize import quantize as run
    from rsq_stream.planning.time_estimate import forecast

    expected = forecast(made)
    with StopRequest() as stop, shown(silent=silent) as listener:
        summary = run(made, listener=listener, stop=stop.event)
    stages = compared(made, expected, summary.stages)
    _report(model, made, summary, stages, as_json=as_json, quiet=quiet)


def _report(
    model: str,
    made: "Job",
    summary: "RunSummary",
    stages: dict[str, dict[str, Any]],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what was made, what stands out in it, and what to do next."""
    warnings = warnings_of(summary.records)
    notices = notices_of(made.plan, summary.records)
    for text in warnings:
        remark("warning", text)
    if as_json:
        found = as_object(made) | {
            "output": str(summary.output),
            "output_bytes": summary.output_bytes,
            "bits_per_weight": made.execution.bits_per_weight,
            "seconds": summary.seconds,
            "resumed_at": summary.resumed_at,
            "stages": stages,
            "warnings": warnings,
            "notices": notices,
            "linears": [dataclasses.asdict(record) for record in summary.records],
        }
        say_json(found)
        return
    if quiet:
        return
    for text in notices:
        remark("notice", text)
    loader = FORMATS[made.plan.output_format].loader(made.plan)
    rows = {
        "output": str(summary.output),
        "size": exact_size(summary.output_bytes),
        "bits per weight": f"{made.execution.bits_per_weight:.3f} over the whole model",
        **_errors(summary.records),
        "time": duration(summary.seconds),
        **serving_rows(serving_of(made)),
        "load it": f"{loader.call(str(summary.output))}  # {loader.remark}",
        "compare it": f"rsq-stream eval {summary.output} --text FILE --against {model}",
    }
    say(facts(rows))
    if stages:
        say(f"\n{stage_table(made, stages)}")


def _errors(records: Sequence[LinearRecord]) -> dict[str, str]:
    """Say how much the linears lost; nothing where none was quantized."""
    if not records:
        return {}
    median = statistics.median(record.relative_error for record in records)
    worst = max(records, key=lambda record: record.relative_error)
    text = f"median {median:.4f}, worst {worst.relative_error:.4f} ({worst.name})"
    return {"relative error": text}
