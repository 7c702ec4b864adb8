"""Time each kernel as a ratio to its floor: a copy of what it moves, or a product.

    python benchmarks/kernels.py [--device cuda] [--quick]

A kernel is checked against its twin first (as ``rsq-stream doctor`` does); a wrong one
ends the program. On a CPU the same rows time the compiled twins, one thread each.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rsq_stream.cli.doctor.kernels import kernel_checks

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import factorise
from rsq_stream.algorithm.gptq.solver import solve
from rsq_stream.algorithm.grids.integer import IntegerGrid
from rsq_stream.algorithm.rotation.hadamard import hadamard_product
from rsq_stream.ops.column_sums import column_sums
from rsq_stream.ops.e8p import round_lattice
from rsq_stream.ops.pack import pack, unpack
from rsq_stream.runtime.worker_pool import Pool

ROUNDS = 5
MOST_CALLS = 20
LONG_ENOUGH_S = 0.05
"""Calls in a row take about this much on a GPU, or are one."""


@dataclass(frozen=True)
class Sizes:
    """Of a 70B-shaped block, or of a quick run."""

    rows: int
    inputs: int
    tokens: int
    heads: int


WHOLE = Sizes(rows=8192, inputs=28672, tokens=8192, heads=64)
QUICK = Sizes(rows=512, inputs=1792, tokens=512, heads=4)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the least of some rounds; on a GPU a call's share of many in a row.

    One call alone would be timed with its launch, which takes as long as some kernels.
    """
    if device.type != "cuda":
        return min(_on_host(run) for _ in range(ROUNDS + 1))
    _on_gpu(run, 1)  # the first compiles
    calls = max(1, min(MOST_CALLS, int(LONG_ENOUGH_S / _on_gpu(run, 1))))
    return min(_on_gpu(run, calls) for _ in range(ROUNDS))


def _on_host(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _on_gpu(run: Callable[[], object], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def copied(moved_bytes: int, device: torch.device) -> float:
    """Time a copy that reads and writes so many bytes in all."""
    source = torch.empty(moved_bytes // 2, dtype=torch.uint8, device=device)
    made = torch.empty_like(source)
    return seconds(lambda: made.copy_(source), device)


def row(name: str, spent_s: float, floor: str, floor_s: float) -> None:
    """Print one line of the table."""
    text = f"| {name} | {1e3 * spent_s:.2f} | {floor} | {spent_s / floor_s:.2f} |"
    print(text, flush=True)


def moving(sizes: Sizes, device: torch.device) -> None:
    """Time what is bound by memory: Hadamard products, packing, the lattice."""
    x_LN = torch.randn(sizes.rows, sizes.inputs, device=device)
    for width in (sizes.inputs, sizes.rows):  # with a dense factor, and without
        for dtype in (torch.float32, torch.bfloat16):
            given = x_LN[:, :width].to(dtype).contiguous()
            spent_s = seconds(
                lambda given=given: hadamard_product(given, given.shape[1]), device
            )
            floor_s = copied(2 * given.numel() * given.element_size(), device)
            kind = str(dtype).removeprefix("torch.")
            row(f"hadamard, {width} wide, {kind}", spent_s, "copy", floor_s)
    code_OI = torch.randint(8, x_LN.shape, device=device).to(torch.uint8)
    word_OW = pack(code_OI, 3)
    moved = code_OI.numel() + 4 * word_OW.numel()
    floor_s = copied(moved, device)
    row("pack, 3 bits", seconds(lambda: pack(code_OI, 3), device), "copy", floor_s)
    spent_s = seconds(lambda: unpack(word_OW, 3, sizes.inputs), device)
    row("unpack, 3 bits", spent_s, "copy", floor_s)
    scale_R = torch.ones(sizes.rows, device=device)
    spent_s = seconds(lambda: round_lattice(x_LN, scale_R), device)
    row("lattice", spent_s, "copy", copied(5 * x_LN.numel(), device))


def attention(sizes: Sizes, device: torch.device) -> None:
    """Time the column sums against one product of all queries and keys."""
    shape = (1, sizes.heads, min(sizes.tokens, 2048), 128)
    for kind in (torch.float32, torch.bfloat16):
        query, key = (torch.randn(shape, device=device).to(kind) for _ in range(2))
        floor_s = seconds(lambda q=query, k=key: q @ k.mT, device)
        spent_s = seconds(lambda q=query, k=key: column_sums(q, k, 128**-0.5), device)
        name = str(kind).removeprefix("torch.")
        row(f"column_sums, {name}", spent_s, "one q k^T", floor_s)


def products(sizes: Sizes, device: torch.device) -> None:
    """Time the Hessian by the rate of a plain product, and the solve by its own."""
    cuda = device.type == "cuda"
    pool = Pool(1)
    kind = torch.bfloat16 if cuda else torch.float32
    for inputs in (sizes.rows, sizes.inputs):
        x_TI = torch.randn(sizes.tokens, inputs, device=device).to(kind)
        weight_T = torch.rand(sizes.tokens, device=device).bfloat16().float()
        hessian = Hessian(inputs, 2048 if cuda else 128, device)
        spent_s = seconds(
            lambda h=hessian, x=x_TI, w=weight_T: h.add([(x, w)], pool), device
        )
        square = x_TI[: min(sizes.tokens, inputs)]
        floor_s = seconds(lambda s=square: s @ s.T, device)
        # Half of a square of inputs; on CUDA twice, as hi and lo.
        flops = sizes.tokens * inputs**2 * (2 if cuda else 1)
        floor_s *= flops / (2 * square.shape[0] ** 2 * inputs)
        row(f"Hessian, {inputs} inputs", spent_s, f"its products, {kind}", floor_s)
        if inputs != sizes.inputs:
            continue
        weight_OI = torch.randn(sizes.rows, inputs, device=device)
        factor = factorise(hessian, 0.01, 128, pool)
        grid = IntegerGrid(
            bits=3,
            symmetric=True,
            signed_scales=True,
            clip_steps=1,
            storage_type=torch.bfloat16,
        )
        rows = 1 << 20 if cuda else 128
        spent_s = seconds(
            lambda f=factor, g=grid, w=weight_OI, r=rows: solve(
                w, f, g, 128, dynamic_scales=True, tile_rows=r, pool=pool
            ),
            device,
        )
        panel_II = factor.matrix_II
        # Products with the errors so far, and of two exact losses: three triangles.
        floor_s = 1.5 * seconds(lambda w=weight_OI, p=panel_II: w @ p, device)
        row(f"solve, {sizes.rows} x {inputs}", spent_s, "its products, fp32", floor_s)


def main() -> None:
    """Check all, then time all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; nothing was measured")
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    for check in kernel_checks(options.device):
        try:
            check.require()
        except ArithmeticError as error:
            sys.exit(f"{check.name}: {error}; not timed")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    level = torch.backends.cpu.get_cpu_capability()
    sizes = QUICK if options.quick else WHOLE
    print(f"{name}, {level}, torch {torch.__version__}; {sizes}\n")
    print("| kernel | ms | floor | ratio |\n|---|---|---|---|")
    moving(sizes, device)
    attention(sizes, device)
    products(sizes, device)


if __name__ == "__main__":
    main()
