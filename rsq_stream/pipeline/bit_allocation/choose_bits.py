"""``--bpw``: bits for each linear, so that the whole output has so many per weight.

Linears that runtimes fuse (q, k, v; gate, up) share their bits. Sizes are exact: they
follow from the headers. Costs are measured (``block_sensitivity.py``).
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from rsq_stream.algorithm.knapsack import Item, allocate
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import UsageError
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.families.base import Group
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.output.layout import output_bits, source_weights
from rsq_stream.pipeline.bit_allocation.costs import BITS, Costs

_TOLERANCE = 0.01
"""Where nothing within this of the target is below it, it may be above by as much."""


@dataclass(frozen=True)
class Choice:
    """The chosen bits, and what is expected of them."""

    plan: QuantizationPlan
    bits_per_weight: float
    cost: float
    """Sum over linears of the share of a token's energy that a block's output loses."""
    uniform: dict[int, tuple[float, float]]
    """For uniform bits: bits per weight of the whole output, and cost."""


@dataclass(frozen=True)
class _Group:
    """Linears of a block that get the same bits."""

    linears: tuple[str, ...]
    """Full names."""
    unit: Item


def require_reachable(
    checkpoint: Checkpoint,
    architecture: Architecture,
    plan: QuantizationPlan,
    bpw: float,
) -> None:
    """Refuse a target below or above what the format can have.

    Raises
    ------
    UsageError
        With the least and the most that would do.
    """
    groups = _groups(checkpoint, architecture, plan, None)
    weights = source_weights(architecture)
    fixed = _fixed_bits(checkpoint, architecture, plan)
    least, most = (
        (fixed + sum(group.unit.sizes[end] for group in groups)) / weights
        for end in (0, -1)
    )
    if not least - _TOLERANCE <= bpw <= most + _TOLERANCE:
        raise UsageError(
            f"--bpw must be {least:.2f} to {most:.2f} for this model, not {bpw:g}: the"
            " whole output counts, and what is not in its blocks' linears takes"
            f" {fixed / weights:.2f} (embedding, head, norms; --head-bits 8 halves the"
            " head)"
        )


def choose_bits(
    checkpoint: Checkpoint,
    architecture: Architecture,
    plan: QuantizationPlan,
    *,
    costs: Costs,
    bpw: float,
) -> Choice:
    """Return the plan whose output has ``bpw`` bits per weight at the least cost.

    Overrides that the plan has already stay as they are.
    """
    require_reachable(checkpoint, architecture, plan, bpw)
    groups = _groups(checkpoint, architecture, plan, costs)
    weights = source_weights(architecture)
    fixed = _fixed_bits(checkpoint, architecture, plan)
    units = [group.unit for group in groups]
    options = None
    for target in (bpw, bpw + _TOLERANCE):
        found = allocate(units, int(target * weights) - fixed)
        options = options if found is None else found
        if options is not None:
            sizes = [u.sizes[o] for u, o in zip(units, options, strict=True)]
            if (fixed + sum(sizes)) / weights >= bpw - _TOLERANCE:
                break
    assert options is not None
    bits = {
        linear: BITS[option]
        for group, option in zip(groups, options, strict=True)
        for linear in group.linears
    }
    usual = _most_common(bits)
    own = {line.partition("=")[0]: line for line in plan.overrides}
    lines = {
        name: f"{name}={chosen}" for name, chosen in bits.items() if chosen != usual
    }
    made = dataclasses.replace(
        plan,
        bits=usual,
        overrides=tuple(
            sorted(
                line
                for name, line in {**lines, **own}.items()
                if line != f"{name}={usual}"
            )
        ),
    )
    return Choice(
        made,
        output_bits(checkpoint, architecture, made) / weights,
        sum((u.costs[o] for u, o in zip(units, options, strict=True)), 0.0),
        {
            wanted: (
                (fixed + sum(unit.sizes[option] for unit in units)) / weights,
                sum((unit.costs[option] for unit in units), 0.0),
            )
            for option, wanted in enumerate(BITS)
        },
    )


def _most_common(bits: dict[str, int]) -> int:
    """Return the bits that most linears have, of equal counts the fewer bits."""
    counts = Counter(bits.values())
    return min(counts, key=lambda number: (-counts[number], number), default=BITS[0])


def _fixed_bits(
    checkpoint: Checkpoint, architecture: Architecture, plan: QuantizationPlan
) -> int:
    """Count the bits of everything whose size is not to be chosen."""
    least = dataclasses.replace(plan, bits=BITS[0])
    groups = _groups(checkpoint, architecture, plan, None)
    chosen = sum(group.unit.sizes[0] for group in groups)
    return output_bits(checkpoint, architecture, least) - chosen


def _groups(
    checkpoint: Checkpoint,
    architecture: Architecture,
    plan: QuantizationPlan,
    costs: Costs | None,
) -> list[_Group]:
    """Return all linears whose bits are to be chosen, as they share them."""
    sizes = _Sizes(checkpoint, architecture, plan, costs)
    groups = [
        sizes.of_group(block, group)
        for block in range(architecture.blocks)
        for stage in architecture.stages(block)
        for group in stage.groups
    ]
    return [group for group in groups if group is not None]


@dataclass(frozen=True)
class _Sizes:
    """What each number of bits takes, and costs where that was measured."""

    checkpoint: Checkpoint
    architecture: Architecture
    plan: QuantizationPlan
    costs: Costs | None

    def of_group(self, block: int, group: Group) -> _Group | None:
        """Return a group's sizes and costs; None if overrides have all its linears."""
        sizes, sums, names = [0] * len(BITS), [0.0] * len(BITS), []
        stored = FORMATS[self.plan.output_format]
        for linear in group.linears:
            name = block_prefix(block) + linear.name
            if self.plan.override(name) is not None:
                continue
            names.append(name)
            dtype = self.checkpoint.entry(f"{name}.weight").dtype
            shape = self.architecture.shape(linear)
            scheme = self.plan.scheme(name, shape[1])
            assert scheme is not None
            for option, bits in enumerate(BITS):
                option_scheme = dataclasses.replace(scheme, bits=bits)
                tensors = stored.tensors(name, shape, option_scheme, dtype)
                sizes[option] += 8 * sum(tensor.size_bytes for tensor in tensors)
                if self.costs is not None:
                    sums[option] += self.costs[name][bits]
        if not names:
            return None
        return _Group(tuple(names), Item(tuple(sizes), tuple(sums)))
