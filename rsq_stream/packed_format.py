"""compressed-tensors ``pack-quantized``: how a quantized linear lies in the output.

Per linear: ``weight_packed`` int32 [O, ceil(I bits / 32)] (dense, see
``algorithm/packing.py``), ``weight_scale`` [O, G] in the model's type,
``weight_shape`` int64 [2], and ``weight_zero_point`` where the grid has one,
packed along O. transformers and vLLM read it; 2, 3, 5, 6, 7 bits need
compressed-tensors >= 0.18.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.grid import decode
from rsq_stream.algorithm.packing import pack, packed_words, unpack
from rsq_stream.algorithm.solver import Solution
from rsq_stream.config import GROUP_SIZES, QuantizationPlan
from rsq_stream.errors import UnsupportedModelError
from rsq_stream.model.architecture import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEARS,
    Architecture,
    block_prefix,
)
from rsq_stream.storage.writer import OutputTensor

FORMAT = "pack-quantized"
_IGNORED = ["lm_head"]
_OURS = {
    "type": ("int",),
    "strategy": ("channel", "group"),
    "dynamic": (False, None),
    "actorder": (None, "weight", "static"),
}
"""What we write, or what means the same; anything else would be read wrongly."""


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized."""

    bits: int
    group_size: int
    """Inputs per scale, -1 for the whole row."""
    symmetric: bool

    def groups(self, inputs: int) -> int:
        """Scales per row."""
        return 1 if self.group_size == -1 else inputs // self.group_size


def scheme_for(plan: QuantizationPlan, inputs: int) -> Scheme:
    """Give the scheme of a linear with that many inputs."""
    return Scheme(plan.bits, plan.group_size_for(inputs), plan.symmetric)


def linear_tensors(
    name: str, shape: tuple[int, int], scheme: Scheme, scale_type: torch.dtype
) -> list[OutputTensor]:
    """Announce the tensors of one quantized linear."""
    outputs, inputs = shape
    groups = scheme.groups(inputs)
    words = packed_words(inputs, scheme.bits)
    tensors = [
        OutputTensor(f"{name}.weight_packed", torch.int32, (outputs, words)),
        OutputTensor(f"{name}.weight_scale", scale_type, (outputs, groups)),
        OutputTensor(f"{name}.weight_shape", torch.int64, (2,)),
    ]
    if not scheme.symmetric:
        rows = packed_words(outputs, scheme.bits)
        zero = OutputTensor(f"{name}.weight_zero_point", torch.int32, (rows, groups))
        tensors.append(zero)
    return tensors


def encode_linear(
    name: str, solution: Solution, scheme: Scheme, scale_type: torch.dtype
) -> dict[str, Tensor]:
    """Give the tensors of one quantized linear as they are stored."""
    tensors = {
        f"{name}.weight_packed": pack(solution.code_OI, scheme.bits),
        f"{name}.weight_scale": solution.scale_OG.to(scale_type),
        f"{name}.weight_shape": torch.tensor(solution.code_OI.shape),
    }
    if not scheme.symmetric:
        zero_GO = solution.zero_OG.T.to(torch.uint8).contiguous()
        packed_GR = pack(zero_GO, scheme.bits)
        tensors[f"{name}.weight_zero_point"] = packed_GR.T.contiguous()
    return tensors


def decode_linear(
    read: Callable[[str], Tensor], name: str, scheme: Scheme
) -> Float[Tensor, "O I"]:
    """Read a stored linear back: round_to_model_type(scale (code - zero)), fp32."""
    outputs, inputs = read(f"{name}.weight_shape").tolist()
    code_OI = unpack(read(f"{name}.weight_packed"), scheme.bits, inputs)
    scale_OG = read(f"{name}.weight_scale")
    if scheme.symmetric:
        zero_OG = torch.full(scale_OG.shape, float(2 ** (scheme.bits - 1)))
    else:
        packed_GR = read(f"{name}.weight_zero_point").T.contiguous()
        zero_OG = unpack(packed_GR, scheme.bits, outputs).T.float()
    return decode(code_OI, scale_OG.float(), zero_OG, scale_OG.dtype)


def output_tensors(
    architecture: Architecture,
    plan: QuantizationPlan,
    dtype_of: Callable[[str], torch.dtype],
) -> list[OutputTensor]:
    """Announce every tensor of the output, in the order of the forward pass.

    ``dtype_of`` gives the source type of a tensor by its name.
    """
    tensors = [
        OutputTensor(EMBEDDING, dtype_of(EMBEDDING), _outer(architecture, EMBEDDING))
    ]
    for block in range(architecture.blocks):
        prefix = block_prefix(block)
        for name, shape in architecture.block_shapes().items():
            linear = name.removesuffix(".weight")
            dtype = dtype_of(prefix + name)
            if linear in LINEARS:
                outputs, inputs = architecture.linear_shape(linear)
                scheme = scheme_for(plan, inputs)
                tensors += linear_tensors(
                    prefix + linear, (outputs, inputs), scheme, dtype
                )
            else:
                tensors.append(OutputTensor(prefix + name, dtype, shape))
    tensors.append(
        OutputTensor(FINAL_NORM, dtype_of(FINAL_NORM), (architecture.width,))
    )
    if not output_is_tied(architecture, plan):
        source = EMBEDDING if architecture.tied else HEAD
        shape = _outer(architecture, EMBEDDING)
        tensors.append(OutputTensor(HEAD, dtype_of(source), shape))
    return tensors


def _outer(architecture: Architecture, name: str) -> tuple[int, ...]:
    return architecture.outer_shapes()[name]


def output_is_tied(architecture: Architecture, plan: QuantizationPlan) -> bool:
    """Whether the output's head is still its embedding: not after a rotation."""
    return architecture.tied and plan.residual_rotation == "none"


def quantization_config(
    architecture: Architecture, plan: QuantizationPlan
) -> dict[str, Any]:
    """Give the ``quantization_config`` of the output's config.json."""
    by_scheme: dict[Scheme, list[str]] = {}
    for linear in LINEARS:
        scheme = scheme_for(plan, architecture.linear_shape(linear)[1])
        by_scheme.setdefault(scheme, []).append(linear)
    groups = {}
    for number, (scheme, linears) in enumerate(by_scheme.items()):
        targets = [f"re:.*{re.escape(linear)}$" for linear in linears]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(by_scheme) == 1 else targets,
            "weights": _weight_arguments(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _IGNORED,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weight_arguments(scheme: Scheme) -> dict[str, Any]:
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def schemes_of(config: Mapping[str, Any], where: str) -> dict[str, Scheme] | None:
    """Give each linear's scheme from a config.json; None if it is not quantized.

    Raises
    ------
    UnsupportedModelError
        The checkpoint is quantized in another way than this tool writes.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    found: dict[str, Scheme] = {}
    try:
        ours = quantization["format"] == FORMAT and quantization["ignore"] == _IGNORED
        for group in quantization["config_groups"].values() if ours else ():
            weights = group["weights"]
            if any(weights.get(key) not in wanted for key, wanted in _OURS.items()):
                break
            scheme = Scheme(
                int(weights["num_bits"]),
                int(weights["group_size"] or -1),
                bool(weights["symmetric"]),
            )
            for linear in LINEARS:
                if any(_targets(target, linear) for target in group["targets"]):
                    found[linear] = scheme
    except (AttributeError, KeyError, TypeError, ValueError):
        found = {}
    if set(found) != set(LINEARS) or any(
        not 2 <= scheme.bits <= 8 or scheme.group_size not in GROUP_SIZES
        for scheme in found.values()
    ):
        raise UnsupportedModelError(
            f"{where}: its quantization_config is not {FORMAT} of all linears of a"
            " block, as this tool writes it"
        )
    return found


def _targets(target: str, linear: str) -> bool:
    if target == "Linear":
        return True
    return target == f"re:.*{re.escape(linear)}$"
