"""What a family says of its decoder blocks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Linears that share one input, and so one Hessian."""

    name: str
    linears: tuple[str, ...]


STAGES = (
    Stage("attention in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Stage("attention out", ("self_attn.o_proj",)),
    Stage("mlp in", ("mlp.gate_proj", "mlp.up_proj")),
    Stage("mlp out", ("mlp.down_proj",)),
)
WRITES_H = 2
"""The stage whose pass writes h; the one after it reads it."""
LINEARS = tuple(name for stage in STAGES for name in stage.linears)


@dataclass(frozen=True)
class Family:
    """How one family's classes are called, and what its blocks may hold."""

    model_type: str
    stem: str
    """Prefix of its classes in transformers: ``Llama`` of ``LlamaDecoderLayer``."""
    causal_class: str
    biases: tuple[str, ...] = ()
    """Linears that always have a bias."""
    bias_options: tuple[str, ...] = ()
    """Which of ``attention_bias`` and ``mlp_bias`` its config.json may set."""
    head_norms: bool = False
    """RMS norms on each head of q and k."""
