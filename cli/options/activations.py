"""The options that say how activations are rounded when the model is served.

``quantize`` and ``plan`` calibrate on them; ``eval`` simulates them, where they take
the place of what the model's folder says.
"""

from dataclasses import dataclass
from typing import Annotated

from .declare import flag, value

_PANEL = "Activations as served (simulated)"
_AS_MADE = "; eval: as calibrated"

ActivationBits = Annotated[
    int | None,
    value(
        _PANEL,
        "--activation-bits",
        "2..8|16",
        "Of the input of every linear but the head, scaled anew for each token.",
        default=f"16, none{_AS_MADE}",
    ),
]
ActivationGroupSize = Annotated[
    int | None,
    value(
        _PANEL,
        "--activation-group-size",
        "N|-1",
        "Inputs of a token that share a scale; -1 is one scale a token.",
        default=f"-1{_AS_MADE}",
    ),
]
ActivationSymmetric = Annotated[
    bool | None,
    flag(
        _PANEL,
        "--activation-symmetric/--activation-asymmetric",
        "Levels around zero, or a zero point.",
        default=f"symmetric{_AS_MADE}",
    ),
]
ActivationClip = Annotated[
    float | None,
    value(
        _PANEL,
        "--activation-clip",
        "SHARE",
        "How much of a token's range the levels span.",
        default=f"1{_AS_MADE}",
    ),
]
KvBits = Annotated[
    int | None,
    value(
        _PANEL,
        "--kv-bits",
        "2..8|16",
        "Of K and V, with a scale for each token and KV head; K is rotated online.",
        default=f"16, none{_AS_MADE}",
    ),
]
KvSymmetric = Annotated[
    bool | None,
    flag(
        _PANEL,
        "--kv-symmetric/--kv-asymmetric",
        "Levels around zero, or a zero point.",
        default=f"symmetric{_AS_MADE}",
    ),
]
KvClip = Annotated[
    float | None,
    value(
        _PANEL,
        "--kv-clip",
        "SHARE",
        "How much of the range of a token's head the levels span.",
        default=f"1{_AS_MADE}",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What the calibrated model sees; by default activations as they are computed."""

    activation_bits: ActivationBits = 16
    activation_group_size: ActivationGroupSize = -1
    activation_symmetric: ActivationSymmetric = True
    activation_clip: ActivationClip = 1.0
    kv_bits: KvBits = 16
    kv_symmetric: KvSymmetric = True
    kv_clip: KvClip = 1.0
