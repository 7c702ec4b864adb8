"""What ``doctor`` asks of the CUDA kernels: compile, agree with the twin, be timed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsq_stream.errors import KernelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROUNDS = 20
_SLACK = 2.0
"""A kernel's error may be twice its twin's, both against float64."""


@dataclass(frozen=True)
class KernelCheck:
    """One kernel on one device: how to run it, and what it must give."""

    name: str
    run: Callable[[], object]
    require: Callable[[], None]
    """Raises ArithmeticError where the kernel and its twin disagree."""
    moved_bytes: int
    """What must be read and written at least: a copy of that is the floor."""


def compiled(architecture: str) -> str:
    """Compile every kernel for an architecture; gives how many there are."""
    from rsq_stream.ops.cuda.cubin_cache import Kernel, source_of
    from rsq_stream.ops.cuda.nvrtc import compile_cubin, compiler_version

    kernels = [
        Kernel("clip_search", "clip_search", ("CHUNKS=3",)),
        Kernel("column_sums", "column_sums"),
        Kernel("column_sums_bf16", "column_sums", ("PAD=128",)),
        Kernel("descent", "descent", ("CHUNKS=4",)),
        Kernel("hadamard", "hadamard", ("LOG=7", "DENSE=1", "ROWS=16", "SIGNS=0")),
        Kernel("e8p", "lattice"),
        Kernel("pack", "pack", ("BITS=3",)),
        Kernel("column_sweep", "sweep", ("CHUNKS=4",)),
        Kernel("two_terms", "two_terms", ("BF16",)),
    ]
    for kernel in kernels:
        text = source_of(kernel.source)
        compile_cubin(kernel.source, text, kernel.defines, architecture)
    version = compiler_version()
    return f"{len(kernels)} sources compile for {architecture}, NVRTC {version}"


def on_device(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Return each kernel's name and its check, which returns its time."""
    for check in kernel_checks(device):
        yield check.name, lambda check=check: _checked(check, device)  # type: ignore[misc]


def _checked(check: KernelCheck, device: str) -> str:
    import torch

    check.require()
    source = torch.empty(check.moved_bytes // 2, dtype=torch.uint8, device=device)
    made = torch.empty_like(source)
    floor_ms = _milliseconds(lambda: made.copy_(source))
    spent_ms = _milliseconds(check.run)
    ratio = spent_ms / floor_ms
    return f"agrees; {spent_ms:.3f} ms, {ratio:.1f} x a copy of what it moves"


def _milliseconds(run: Callable[[], object]) -> float:
    """Time one call on the device, as the mean of some."""
    import torch

    run()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(_ROUNDS):
        run()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / _ROUNDS


def kernel_checks(device: str) -> list[KernelCheck]:
    """Return a check for each kernel; on the CPU its compiled twin stands in."""
    import torch

    torch.manual_seed(0)
    rows, columns = 4096, 128
    weight_RC = torch.randn(rows, columns)
    upper_CC = torch.randn(columns, columns).triu(1) / 16
    hessian_CC = upper_CC.T @ upper_CC + torch.eye(columns)
    scale_R, zero_R = torch.rand(rows) + 0.25, torch.full((rows,), 4.0)
    level_RL = (torch.arange(8.0) - zero_R[:, None]) * scale_R[:, None]
    rest = (scale_R, zero_R, level_RL)
    return [
        _sweep(device, (weight_RC, weight_RC, upper_CC, *rest)),
        _descent(device, (weight_RC, hessian_CC, *rest)),
        _clip_search(device, weight_RC, zero_R),
        _lattice(device, weight_RC, scale_R),
        _packing(device),
        _hadamard(device),
        _column_sums(device, torch.float32),
        _column_sums(device, torch.bfloat16),
        _terms(device, weight_RC, scale_R),
    ]


def _equal(what: str, found: "Tensor", twin: "Tensor") -> None:
    differing = int((found.cpu() != twin).sum())
    if differing:
        raise ArithmeticError(f"{differing} of {twin.numel()} {what} differ")


def _budget(found: "Tensor", naive: "Tensor", exact: "Tensor") -> None:
    """Hold an error against the twin's, both against float64."""
    wrong = float((found.double().cpu() - exact).square().mean().sqrt())
    allowed = float((naive.double() - exact).square().mean().sqrt()) * _SLACK
    if not wrong <= allowed + 1e-7 * float(exact.abs().max()):
        raise ArithmeticError(f"error {wrong:.2e}, allowed {allowed:.2e}")


def _sweep(device: str, given: Any) -> KernelCheck:
    from rsq_stream.ops.column_sweep import sweep, sweep_naive

    there: Any = [value.to(device) for value in given]

    def require() -> None:
        made, twin = sweep(*there), sweep_naive(*given)
        _equal("codes", made.code_RC, twin.code_RC)
        _equal("errors", made.error_RC, twin.error_RC)
        _equal("values left over", made.residual_RC, twin.residual_RC)

    moved = given[0].numel() * 17
    return KernelCheck("kernel sweep", lambda: sweep(*there), require, moved)


def _descent(device: str, given: Any) -> KernelCheck:
    import torch

    from rsq_stream.ops.descent import descend

    code_RC = torch.randint(8, given[0].shape).to(torch.uint8)
    there: Any = [value.to(device) for value in (code_RC, *given)]

    def require() -> None:
        _equal("codes", descend(*there), descend(code_RC, *given))

    moved = code_RC.numel() * 6
    return KernelCheck("kernel descent", lambda: descend(*there), require, moved)


def _clip_search(device: str, target_RC: "Tensor", zero_R: "Tensor") -> KernelCheck:
    import torch

    from rsq_stream.ops.clip_search import best_scale

    full_R = target_RC.abs().amax(dim=1) / 3
    scale_RP = full_R[:, None] * (1 - 0.01 * torch.arange(80))
    given: Any = (target_RC, scale_RP, zero_R, 7, 2.0, True)
    there: Any = (*(value.to(device) for value in given[:3]), *given[3:])

    def require() -> None:
        _equal("choices", best_scale(*there), best_scale(*given))

    moved = (target_RC.numel() + scale_RP.numel()) * 4
    return KernelCheck("kernel clip_search", lambda: best_scale(*there), require, moved)


def _lattice(device: str, target_RC: "Tensor", scale_R: "Tensor") -> KernelCheck:
    from rsq_stream.ops.e8p import round_lattice

    there = (target_RC.to(device), scale_R.to(device))

    def require() -> None:
        _equal("digits", round_lattice(*there), round_lattice(target_RC, scale_R))

    moved = target_RC.numel() * 5
    return KernelCheck("kernel lattice", lambda: round_lattice(*there), require, moved)


def _packing(device: str) -> KernelCheck:
    import torch

    from rsq_stream.ops.pack import pack, unpack

    code_OI = torch.randint(8, (4096, 4096)).to(torch.uint8)
    there = code_OI.to(device)

    def require() -> None:
        word_OW = pack(there, 3)
        _equal("words", word_OW, pack(code_OI, 3))
        _equal("codes", unpack(word_OW, 3, 4096), code_OI)

    moved = code_OI.numel() * 11 // 8
    return KernelCheck("kernel pack", lambda: pack(there, 3), require, moved)


def _hadamard(device: str) -> KernelCheck:
    import torch

    from rsq_stream.algorithm.rotation.hadamard import hadamard_product

    order = 28 * 128
    x_LN = torch.randn(2048, order)
    there = x_LN.to(device)

    def require() -> None:
        some_LN = x_LN[:63]
        exact_LN = hadamard_product(some_LN.double(), order)
        naive_LN = hadamard_product(some_LN, order)
        _budget(hadamard_product(there[:63], order), naive_LN, exact_LN)

    moved = x_LN.numel() * 8
    run = lambda: hadamard_product(there, order)  # noqa: E731
    return KernelCheck("kernel hadamard", run, require, moved)


def _column_sums(device: str, kind: "torch.dtype") -> KernelCheck:
    import torch

    from rsq_stream.ops.column_sums import column_sums, column_sums_naive

    query, key = (torch.randn(1, heads, 300, 64).to(kind) for heads in (8, 2))
    scaling = 1 / math.sqrt(64)
    there: Any = (query.to(device), key.to(device), scaling)

    def require() -> None:
        whole = query.double() @ key.double().repeat_interleave(4, dim=1).mT * scaling
        later = torch.ones(300, 300).triu(1).bool()
        exact_BT = whole.masked_fill(later, -torch.inf).softmax(-1).sum((1, 2))
        naive_BT = column_sums_naive(query, key, scaling)
        _budget(column_sums(*there), naive_BT, exact_BT)

    moved = kind.itemsize * (query.numel() + key.numel())
    name = "kernel column_sums" + ", bf16" * (kind == torch.bfloat16)
    return KernelCheck(name, lambda: column_sums(*there), require, moved)


def _terms(device: str, x_TC: "Tensor", weight_T: "Tensor") -> KernelCheck:
    import torch

    from rsq_stream.ops.two_terms import two_terms

    kind = torch.bfloat16
    x_TC = x_TC.to(kind)
    there: Any = (x_TC.to(device), kind, weight_T.to(device))

    def require() -> None:
        found, twin = two_terms(*there), two_terms(x_TC, kind, weight_T)
        _equal("terms", found.high_TC, twin.high_TC)
        _equal("terms", found.low_TC, twin.low_TC)

    moved = 6 * x_TC.numel()
    return KernelCheck("kernel terms", lambda: two_terms(*there), require, moved)


def without_device() -> str:
    """Compile for one architecture where there is no device to run on."""
    try:
        return f"{compiled('sm_90')}; no device to run them"
    except KernelError as error:
        return f"not compiled: {str(error).split(',')[0]}; only CUDA needs them"
