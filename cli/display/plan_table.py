"""A plan as a table and as JSON, and whether the disks have room for it."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.config.quantization_plan import QuantizationPlan

from .forecast import forecast_rows
from .serving import serving_of, serving_rows
from .text import exact_size, facts, remark, say, say_json, size

if TYPE_CHECKING:
    from rsq_stream.pipeline.job import Job


def show(made: "Job", *, as_json: bool) -> None:
    """Write a plan to stdout, as a table or as one JSON object."""
    from rsq_stream.planning.time_estimate import forecast

    if as_json:
        say_json(as_object(made))
    else:
        found = rows(made) | forecast_rows(forecast(made))
        say(facts(found | serving_rows(serving_of(made))))


def as_object(made: "Job") -> dict[str, Any]:
    """Return both halves of the plan as JSON takes them, and what is expected of it."""
    from rsq_stream.planning.time_estimate import forecast

    expected = forecast(made)
    seconds = None if expected is None else expected.seconds
    return {
        "predicted_seconds": seconds,
        "plan": dataclasses.asdict(made.plan),
        "execution": dataclasses.asdict(made.execution),
        "plan_sha256": made.plan.sha256,
        "serving": dataclasses.asdict(serving_of(made)),
    }


def rows(made: "Job") -> dict[str, str]:
    """Return the table: what is made, with what, in which room."""
    from rsq_stream.planning.memory.resident_units import tightest_on_host

    plan, execution, options = made.plan, made.execution, made.options
    tightest, host_bytes = tightest_on_host(made)
    group = "one scale a row" if plan.group_size == -1 else f"{plan.group_size}"
    if execution.fallbacks and plan.group_size != -1:
        group += f"; one scale a row for {', '.join(execution.fallbacks)}"
    grid = GRIDS[plan.grid].in_words(symmetric=plan.symmetric)
    if plan.signed_scales:
        grid += ", signed scales"
    rotation = plan.residual_rotation
    if rotation != "none":
        rotation = f"{rotation} (residual), {plan.value_rotation} (value heads)"
    if plan.rotates_online:
        rotation += (
            f"; at inference {plan.heads_rotation} (across heads), {plan.mlp_rotation}"
            " (MLP)"
        )
    found = {
        "method": plan.method,
        **_codes(plan, grid, group),
        "rotation": rotation,
    }
    if plan.needs_calibration:
        found["solver"] = _solver(plan)
        copies = f", {plan.expand} rolled copies each" if plan.expand > 1 else ""
        found["calibration"] = (
            f"{plan.calibration}: {plan.samples} windows of {plan.sequence_length}"
            f" tokens{copies}"
        )
        found["token importance"] = _importance(plan)
    if plan.rounds_activations:
        found["activations"] = plan.activations_text()
    found |= {
        "blocks": str(made.architecture.blocks),
        "source": exact_size(execution.source_bytes),
        **_source_on_disk(made),
        "output shards": exact_size(execution.output_bytes),
        "bits per weight": f"{execution.bits_per_weight:.3f} over the whole model",
        "device": f"{options.device}, {options.workers} threads,"
        f" {execution.in_flight} units in flight",
        **_gpu_memory(made),
        "host memory": _of(host_bytes, options.ram_bytes),
        "tightest stage": execution.tightest.name if options.on_gpu else tightest,
        "scratch on disk": size(execution.scratch_bytes),
        "written in all": size(execution.written_bytes),
        "free on disk": size(_free_bytes(options.output)),
        "output folder": str(options.output),
        "work folder": str(options.work_dir),
        "plan": plan.sha256[:16],
    }
    return found


def _gpu_memory(made: "Job") -> dict[str, str]:
    """Say what of the card is needed, and where a block's weights lie."""
    if not made.options.on_gpu:
        return {}
    text = _of(made.execution.device_bytes, made.options.vram_bytes)
    if made.execution.offloads_weights:
        text += "; weights are fetched from host memory for each use"
    return {"GPU memory": text}


def _of(taken_bytes: int, budget_bytes: int | None) -> str:
    """Write what is taken, and of how much if an option said so."""
    budget = "" if budget_bytes is None else f" of {size(budget_bytes)}"
    return size(taken_bytes) + budget


def _codes(plan: QuantizationPlan, grid: str, group: str) -> dict[str, str]:
    """Say how weights become codes; nothing where none does."""
    if plan.method == "rotate":
        return {}
    codes = {"codes": f"{plan.bits} bits, {grid}"}
    return codes | _own_schemes(plan) | {"group size": group}


def _source_on_disk(made: "Job") -> dict[str, str]:
    """Say what of the source is on disk at a time, where it is not all of it."""
    if not made.options.evict_source:
        return {}
    most = size(made.execution.source_disk_bytes)
    return {"source on disk": f"at most {most} at a time, in the hub's cache"}


def _own_schemes(plan: QuantizationPlan) -> dict[str, str]:
    """Say which linears have bits of their own: how many of each role."""
    found: dict[str, Counter[str]] = {}
    for line in plan.overrides:
        name, _, own = line.partition("=")
        bits, _, group = own.partition("g")
        kind = f"{bits} bits" + (f", group {group}" if group else "")
        found.setdefault(kind, Counter())[name.rpartition(".")[2]] += 1
    text = "; ".join(
        f"{kind}: " + ", ".join(f"{count} {role}" for role, count in roles.items())
        for kind, roles in sorted(found.items())
    )
    return {"their own": text} if text else {}


def _importance(plan: QuantizationPlan) -> str:
    """Return how tokens are weighed: the strategy, and options beside the defaults."""
    strategy = STRATEGIES[plan.importance]
    parts = [f"{plan.importance} ({strategy.help})"]
    if strategy.takes_tokens:
        parts.append(f"{plan.importance_tokens} tokens")
    if strategy.takes_chunks:
        parts.append(plan.importance_chunks)
    if strategy.score is not None:
        parts.append(f"{plan.importance_min:.4g} to {plan.importance_max:.4g}")
    usual = {"power": 1, "visible": "no", "transform": "no", "linears": ()}
    for name in (
        *("power", "visible", "transform", "quantile", "skip"),
        *("mask", "truncate", "bins", "reverse", "linears"),
    ):
        given = getattr(plan, f"importance_{name}")
        if given != usual.get(name, 0):
            text = " ".join(given) if isinstance(given, tuple) else given
            parts.append(f"{name} {text}")
    return ", ".join(parts)


def _solver(plan: QuantizationPlan) -> str:
    """Say how the codes are found."""
    parts = ["GPTQ"]
    if plan.act_order:
        parts.append("heavy inputs first")
    if plan.group_size != -1:
        parts.append(f"{plan.group_scales} group scales")
    if plan.refit:
        parts.append("scales refitted")
    if plan.sweeps:
        parts.append(f"{plan.sweeps} sweeps of descent")
    if plan.streams > 1:
        parts.append(f"{plan.propagate:g} of earlier layers' error made up for")
        own = sorted({line.rpartition("=")[2] for line in plan.propagate_overrides})
        if own:
            parts.append(f"of some linears {' or '.join(own)}")
        if not plan.residual_correction:
            parts.append("not of the residual's")
    return ", ".join(parts)


def warn_about_room(made: "Job") -> None:
    """Warn if this machine's memory or disks will not do."""
    from rsq_stream.checkpoint.hub_shards import bytes_to_fetch
    from rsq_stream.pipeline.disk_space import missing_space
    from rsq_stream.planning.memory.resident_units import tightest_on_host
    from rsq_stream.runtime.host_memory import available_bytes

    _, host_bytes = tightest_on_host(made)
    free_bytes = made.execution.used_bytes + available_bytes()
    if host_bytes > free_bytes:
        remark(
            "warning",
            f"{size(host_bytes)} of host memory will be needed, {size(free_bytes)} are"
            " free: the system may end the run, and the same command then goes on",
        )

    fetched_bytes = bytes_to_fetch(made.checkpoint, made.options)
    missing = missing_space(made.execution, made.options, fetched_bytes)
    if missing:
        remark("warning", missing)


def _free_bytes(path: Path) -> int:
    from rsq_stream.storage.atomic import existing

    return shutil.disk_usage(existing(path.absolute())).free
