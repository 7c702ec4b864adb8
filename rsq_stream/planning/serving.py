"""What it will be like to serve an output: size, room for a KV cache, who takes it."""

from dataclasses import dataclass

from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.formats.base import LOAD_MODEL, ShardLayout
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import LM_HEAD_LINEAR, UNQUANTIZED
from rsq_stream.model.architecture import Architecture

KV_BYTES = 2
"""K and V are kept in 16 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """An output in use."""

    resident_bytes: int
    """Codes, scales, embedding, head and norms: what a loader keeps on the card."""
    kv_bytes_per_token: int
    vram_bytes: int | None
    """The card it was planned for; None where no size is known."""
    kv_tokens: int | None
    """Tokens of KV cache, of all requests together, that fit beside the model."""
    runtimes: tuple[str, ...]
    """Who takes these bits, and how."""


def serving(
    architecture: Architecture,
    plan: QuantizationPlan,
    layouts: list[ShardLayout],
    vram_bytes: int | None,
) -> Serving:
    """Work out what serving takes, before anything is made.

    Activations and a runtime's own buffers are not counted: they are the runtime's
    choice.
    """
    resident = sum(
        tensor.size_bytes for made in layouts for _, tensor in made.places.values()
    )
    heads = architecture.kv_heads * architecture.head_width
    per_token = 2 * KV_BYTES * heads * architecture.blocks
    left = None if vram_bytes is None else max(0, vram_bytes - resident) // per_token
    return Serving(
        resident_bytes=resident,
        kv_bytes_per_token=per_token,
        vram_bytes=vram_bytes,
        kv_tokens=left,
        runtimes=runtimes(architecture, plan),
    )


def runtimes(architecture: Architecture, plan: QuantizationPlan) -> tuple[str, ...]:
    """Name the runtimes that take a plan's output, and what each needs for it."""
    stored = FORMATS[plan.output_format]
    if stored.loader(plan) is LOAD_MODEL:
        return ("rsq_stream.load_model, and no other",)
    bits = _bits(architecture, plan)
    if not bits:
        return ("any that takes the source",)
    return stored.runtimes(bits, symmetric=plan.symmetric)


def _bits(architecture: Architecture, plan: QuantizationPlan) -> set[int]:
    """Return the bits that any linear has; those that are kept have none."""
    if plan.method == "rotate":
        return set()
    schemes = [
        plan.scheme(name, architecture.size(linear.inputs))
        for name, (_, linear) in architecture.model_linears().items()
    ]
    schemes.append(plan.scheme(LM_HEAD_LINEAR, architecture.width))
    return {
        made.bits for made in schemes if made is not None and made.bits != UNQUANTIZED
    }
