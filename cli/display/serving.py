"""The lines about serving an output, in ``plan`` and at the end of ``quantize``."""

from typing import TYPE_CHECKING

from .text import exact_size, size

if TYPE_CHECKING:
    from rsq_stream.pipeline.job import Job
    from rsq_stream.planning.serving import Serving


def serving_of(made: "Job") -> "Serving":
    """Work out what serving the output takes, on the card of ``--vram`` or this one."""
    import torch

    from rsq_stream.output.layout import plan_layouts
    from rsq_stream.planning.serving import serving

    architecture = made.architecture
    vram_bytes = made.options.vram_bytes
    if vram_bytes is None and made.options.on_gpu:
        card = torch.cuda.get_device_properties(torch.device(made.options.device))
        vram_bytes = card.total_memory
    layouts = plan_layouts(made.checkpoint, architecture, made.plan)
    return serving(architecture, made.plan, layouts, vram_bytes)


def serving_rows(found: "Serving") -> dict[str, str]:
    """Say it in three lines."""
    each = f"{size(found.kv_bytes_per_token)} a token in 16 bits"
    if found.vram_bytes is not None and found.kv_tokens is not None:
        card = f"on {size(found.vram_bytes)}"
        each += f"; {found.kv_tokens:,} tokens fit beside the model {card}"
        if not found.kv_tokens:
            each += " (the model alone does not fit)"
    return {
        "served size": exact_size(found.resident_bytes),
        "KV cache": each,
        "runs in": "; ".join(found.runtimes),
    }
