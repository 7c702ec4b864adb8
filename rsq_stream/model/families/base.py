"""What a family says of its decoder blocks: the stage graph, as data.

A block is a chain of stages. A stage is one calibration pass, and holds groups of
linears; a group shares one input, and so one Hessian. From these facts follow the
shapes of a block, what a rotation does to each linear, what a pass and a solve take of
memory and time, and what a resumed run takes up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


class Activation(Enum):
    """Activations of a block that linears read; ``model/block.py`` computes them."""

    ATTENTION_INPUT = "a = norm1(x)"
    ATTENTION_OUTPUT = "c = attention(q(a), k(a), v(a))"
    MLP_INPUT = "m = norm2(h)"
    MLP_INNER = "u = act(gate(m)) * up(m)"


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear of a block.

    ``inputs`` and ``outputs`` are axes of an ``Architecture``: ``width``, ``heads``
    (all query heads), ``keys`` (all KV heads), ``mlp``.
    """

    name: str
    """Its name in the block: ``self_attn.q_proj``."""
    inputs: str
    outputs: str
    norm: str = ""
    """The norm through which it reads the residual stream."""
    writes_residual: bool = False
    value_heads: Literal["", "outputs", "inputs"] = ""
    """The side that holds value heads, where R2 acts: v's outputs, o's inputs."""
    online_rotation: Literal["", "heads", "mlp"] = ""
    """What a full rotation does to its input at inference."""

    @property
    def projection(self) -> str:
        """The last part of the name: ``q_proj``."""
        return self.name.rpartition(".")[2]

    @property
    def role(self) -> str:
        """What it is in its block: ``q``."""
        return self.projection.removesuffix("_proj")


@dataclass(frozen=True)
class Group:
    """Linears that share one input, and so one Hessian."""

    linears: tuple[Linear, ...]
    expert: int | None = None
    """The expert that the group belongs to; only tokens routed to it are counted."""

    @property
    def alone(self) -> Linear | None:
        """The linear, if it is the only one: error propagation then has its own G."""
        return self.linears[0] if len(self.linears) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Groups whose statistics come from one calibration pass."""

    name: str
    """Key of its timings in the journal, and what a progress line shows."""
    groups: tuple[Group, ...]
    """One in a dense block; one an expert in a mixture of experts."""
    input: Activation
    """What its linears read."""
    reads: Literal["x", "h"]
    """The slot that its pass reads."""
    writes: Literal["", "h"] = ""
    """The slot that its pass writes, for the stages after it."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears of all groups."""
        return tuple(linear for group in self.groups for linear in group.linears)


ATTENTION_NORM = "input_layernorm.weight"
MLP_NORM = "post_attention_layernorm.weight"
Q = Linear(
    name="self_attn.q_proj", inputs="width", outputs="heads", norm=ATTENTION_NORM
)
K = Linear(name="self_attn.k_proj", inputs="width", outputs="keys", norm=ATTENTION_NORM)
V = Linear(
    name="self_attn.v_proj",
    inputs="width",
    outputs="keys",
    norm=ATTENTION_NORM,
    value_heads="outputs",
)
O = Linear(  # noqa: E741  the field's name for it
    name="self_attn.o_proj",
    inputs="heads",
    outputs="width",
    writes_residual=True,
    value_heads="inputs",
    online_rotation="heads",
)
GATE = Linear(name="mlp.gate_proj", inputs="width", outputs="mlp", norm=MLP_NORM)
UP = Linear(name="mlp.up_proj", inputs="width", outputs="mlp", norm=MLP_NORM)
DOWN = Linear(
    name="mlp.down_proj",
    inputs="mlp",
    outputs="width",
    writes_residual=True,
    online_rotation="mlp",
)
GATED_DENSE = (
    Stage(
        name="attention in",
        groups=(Group((Q, K, V)),),
        input=Activation.ATTENTION_INPUT,
        reads="x",
    ),
    Stage(
        name="attention out",
        groups=(Group((O,)),),
        input=Activation.ATTENTION_OUTPUT,
        reads="x",
    ),
    Stage(
        name="mlp in",
        groups=(Group((GATE, UP)),),
        input=Activation.MLP_INPUT,
        reads="x",
        writes="h",
    ),
    Stage(
        name="mlp out",
        groups=(Group((DOWN,)),),
        input=Activation.MLP_INNER,
        reads="h",
    ),
)
"""norm -> attention -> norm -> gated MLP, as all dense families here have it."""


def gated_dense(config: Mapping[str, Any], block: int) -> tuple[Stage, ...]:
    """Return the stages of a dense block: the same in every block."""
    del config, block
    return GATED_DENSE


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's classes are called, and what its blocks hold."""

    model_type: str
    """As config.json has it; ``modeling_<model_type>`` is its module."""
    class_prefix: str
    """Prefix of its classes in transformers: ``Llama`` of ``LlamaDecoderLayer``."""
    stages: Callable[[Mapping[str, Any], int], tuple[Stage, ...]] = gated_dense
    """The stages of a block, from config.json and the block's number. Blocks of one
    kind share one tuple."""
    always_biased: tuple[str, ...] = ()
    """Linears, by their names in the block, that always have a bias."""
    bias_options: tuple[str, ...] = ()
    """Which of ``attention_bias`` and ``mlp_bias`` its config.json may set."""
    head_norms: bool = False
    """There are RMS norms on each head of q and k."""
    kv_heads_default: bool = False
    """Without ``num_key_value_heads`` there are as many KV heads as heads."""
    head_width_default: int | None = None
    """Head width without ``head_dim``; None for hidden_size / num_attention_heads."""
    whole_heads: bool = False
    """Even with ``head_dim``, ``hidden_size`` must be a multiple of the heads."""

    @property
    def causal_class(self) -> str:
        """The class of the whole model: ``LlamaForCausalLM``."""
        return f"{self.class_prefix}ForCausalLM"
