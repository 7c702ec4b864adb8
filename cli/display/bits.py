"""``--bpw``: measure what bits cost, choose them, and say what was chosen and why."""

from typing import TYPE_CHECKING, Any

from rsq_stream.model.tensor_names import block_prefix

from .text import facts

if TYPE_CHECKING:
    from rsq_stream.pipeline.bit_allocation.choose_bits import Choice
    from rsq_stream.pipeline.job import Job


def as_choice(choice: "Choice") -> dict[str, Any]:
    """Return what was chosen, and what is expected of it, as JSON takes it."""
    return {
        "bits_per_weight": choice.bits_per_weight,
        "cost": choice.cost,
        "uniform": {
            str(bits): {"bits_per_weight": size, "cost": cost}
            for bits, (size, cost) in choice.uniform.items()
        },
    }


def require_free(made: "Job") -> None:
    """Refuse an output folder that the run itself would refuse, before measuring."""
    from rsq_stream.output.folder_checks import require_usable
    from rsq_stream.storage.journal import NAME

    resuming = (made.options.work_dir / NAME).exists()
    require_usable(made.options.output, resuming=resuming)


def explained(made: "Job", choice: "Choice") -> str:
    """Write the choice: bits by block for each stage, and what it is expected to do."""
    rows: dict[str, list[str]] = {}
    for block in range(made.architecture.blocks):
        for stage in made.architecture.stages(block):
            for group in stage.groups:
                name = ", ".join(linear.role for linear in group.linears)
                digits = _bits(made, block, group.linears[0].name)
                rows.setdefault(name, []).append(digits)
    table = facts({name: " ".join(bits) for name, bits in rows.items()})
    chosen = f"{choice.bits_per_weight:.3f} bits per weight"
    expected = {
        f"all at {bits} bits": f"{cost:.4f} at {size:.3f} bits per weight"
        for bits, (size, cost) in choice.uniform.items()
    }
    expected["as chosen"] = f"{choice.cost:.4f} at {chosen}"
    return (
        f"bits by block, for {chosen} over the whole model:\n{table}\n\n"
        "share of its output that each block loses, as measured, over all blocks:\n"
        f"{facts(expected)}"
    )


def _bits(made: "Job", block: int, linear: str) -> str:
    own = made.plan.override(block_prefix(block) + linear)
    return str(made.plan.bits if own is None else own.bits)
