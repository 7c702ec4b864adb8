"""Time the parts that carry a run, each as a ratio to what the machine can do.

    python benchmarks/run.py [--size 4096] [--device cpu]

Floors are measured in the same run: one matrix product of the same size for the
solver, a plain product for the Hessian, a raw O_DIRECT file for the cache. Each
part is checked before it is timed; a wrong result is not given a speed.
"""

import argparse
import mmap
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import factorise
from rsq_stream.algorithm.gptq.loss import weighted_losses
from rsq_stream.algorithm.gptq.solver import Solution, solve
from rsq_stream.algorithm.grids.integer import IntegerGrid
from rsq_stream.ops.column_layout import laid_out
from rsq_stream.ops.pack import pack, unpack
from rsq_stream.planning.quantization_plan import host_tile_rows
from rsq_stream.runtime.worker_pool import Pool, single_threaded_products
from rsq_stream.storage.activation_cache import Slot
from rsq_stream.storage.activation_shape import SlotShape
from rsq_stream.storage.direct_io import has_direct_io

TILE = 128
ROUNDS = 3


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def least(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the quickest of some calls: others were disturbed."""
    return min(timed(function, device) for _ in range(ROUNDS))


def row(name: str, seconds: float, floor: str, floor_s: float) -> None:
    """Print one line of the table."""
    print(f"| {name} | {seconds:.3f} | {floor} | {seconds / floor_s:.2f} |", flush=True)


def solver(size: int, device: torch.device, pool: Pool) -> None:
    """Time Hessian, factorisation, solve and packing of a size x size linear."""
    cuda = device.type == "cuda"
    panel, rows = (2048, 1 << 20) if cuda else (TILE, host_tile_rows(size))
    torch.manual_seed(0)
    weight_OI = torch.randn(size, size, device=device)
    x_TI = torch.randn(2 * size, size, device=device) * torch.rand(size, device=device)
    weight_T = torch.rand(2 * size, device=device).bfloat16().float()
    torch.set_num_threads(pool.workers)
    product_s = least(lambda: weight_OI @ weight_OI, device)
    gram_s = least(lambda: x_TI.T @ x_TI, device)
    torch.set_num_threads(1)
    hessian = Hessian(size, panel, device)
    row(
        f"Hessian, {2 * size} tokens",
        least(lambda: hessian.add([(x_TI, weight_T)], pool), device),
        "X^T X",
        gram_s,
    )
    made, kept_II, spent = [], hessian.matrix_II.clone(), []
    for _ in range(ROUNDS):
        hessian.matrix_II.copy_(kept_II)
        spent.append(
            timed(lambda: made.append(factorise(hessian, 0.01, TILE, pool)), device)
        )
    factor_s, factor = min(spent), made[-1]
    product = f"{size}^3 product"
    row("factorisation", factor_s, product, product_s)
    # Not mirrored, as the textbook's: without a search there is nothing to choose.
    plain, searched = (
        IntegerGrid(
            bits=3,
            symmetric=True,
            signed_scales=False,
            clip_steps=steps,
            storage_type=torch.bfloat16,
        )
        for steps in (1, 80)
    )

    def run(weight: torch.Tensor, grid: IntegerGrid) -> Solution:
        return solve(
            weight,
            factor,
            grid,
            TILE,
            dynamic_scales=True,
            tile_rows=rows,
            pool=pool,
        )

    for grid in (plain, searched):
        run(weight_OI[:TILE], grid)  # compiles
    found = []
    solve_s = least(lambda: found.append(run(weight_OI, plain)), device)
    if not found[0].relative_error < found[0].rounding_error:
        sys.exit("the solver is no better than rounding: not timed")
    row("solve, exact losses included", solve_s, product, product_s)
    packed = []
    pack_s = least(lambda: packed.append(pack(found[0].code_OI, 3)), device)
    if not torch.equal(unpack(packed[0], 3, size), found[0].code_OI):
        sys.exit("unpack(pack(x)) is not x: not timed")
    row("packing", pack_s, product, product_s)
    tiles = [[laid_out(tile_RI)] * 2 for tile_RI in weight_OI.split(rows)]
    losses_s = least(
        lambda: pool.map(lambda two: weighted_losses(two, factor), tiles), device
    )
    row("exact losses, of rounding and of the weights", losses_s, product, product_s)
    whole_s = factor_s + solve_s + pack_s
    total_s = whole_s - losses_s
    row("factorisation, sweep, packing", total_s, product, product_s)
    row("the losses too", whole_s, product, product_s)
    search_s = least(lambda: run(weight_OI, searched), device) - solve_s
    row("clip search, 80 steps", search_s, product, product_s)
    loop = []
    torch.set_num_threads(pool.workers)
    loop_s = least(lambda: loop.append(torch_loop(weight_OI, kept_II, 3)), device)
    torch.set_num_threads(1)
    error, energy = weighted_losses([weight_OI - loop[0], weight_OI], factor).tolist()
    error /= energy
    # The same method: only ties, and scales rounded to bf16, tell them apart.
    if not abs(error / found[0].relative_error - 1) < 0.01:
        sys.exit(f"the torch loop has {error}, not {found[0].relative_error}")
    row("textbook GPTQ, a torch loop", loop_s, "the three", total_s)
    row("textbook GPTQ, a torch loop", loop_s, "the losses too", whole_s)


def torch_loop(
    weight_OI: torch.Tensor, upper_II: torch.Tensor, bits: int
) -> torch.Tensor:
    """Quantize as the textbook does: an inverse, its Cholesky factor, a column a step.

    Gives decoded weights; scales are those of the range, per group of ``TILE``.
    """
    hessian_II = upper_II.triu() + upper_II.triu(1).T
    hessian_II.diagonal().add_(0.01 * hessian_II.diagonal().mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    inverse_II = torch.linalg.cholesky(inverse_II, upper=True)
    left_OI, made_OI = weight_OI.clone(), torch.empty_like(weight_OI)
    half = 2 ** (bits - 1)
    for start in range(0, weight_OI.shape[1], TILE):
        end = start + TILE
        block_OC = left_OI[:, start:end]
        error_OC = torch.empty_like(block_OC)
        scale_O = block_OC.abs().amax(1) / (half - 1)
        upper_CC = inverse_II[start:end, start:end]
        for k in range(TILE):
            code_O = (block_OC[:, k] / scale_O).round().clamp(-half, half - 1)
            made_OI[:, start + k] = code_O * scale_O
            error_OC[:, k] = (block_OC[:, k] - code_O * scale_O) / upper_CC[k, k]
            block_OC[:, k:] -= error_OC[:, k, None] * upper_CC[k, k:]
        left_OI[:, end:] -= error_OC @ inverse_II[start:end, end:]
    return made_OI


def cache(folder: Path) -> None:
    """Time the activation cache against a raw O_DIRECT file."""
    if not has_direct_io(folder):
        print("no direct I/O here: the cache is not timed")
        return
    shape = SlotShape(
        sequences=32, tokens=2048, width=4096, unit_sequences=1, dtype=torch.bfloat16
    )
    x_BTD = torch.randn(shape.unit_shape(0)).bfloat16()
    block = mmap.mmap(-1, shape.unit_bytes)
    block.write(x_BTD.view(torch.uint8).numpy().tobytes())
    path = folder / "raw"

    def write_raw() -> None:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
        for _ in range(shape.units):
            os.write(descriptor, block)
        os.fsync(descriptor)
        os.close(descriptor)

    def read_raw() -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        for _ in range(shape.units):
            os.readv(descriptor, [block])
        os.close(descriptor)

    slot = Slot(folder / "slot", shape, 0, 4, direct=True)

    def write_slot() -> None:
        for unit in range(shape.units):
            slot.write(unit, x_BTD, durable=True)
        slot.flush(durable=True)

    def read_slot() -> None:
        for _ in slot.read(range(shape.units)):
            pass

    # Files that are there already, as in a run: each slot is written once a block.
    works = (write_raw, write_slot, read_raw, read_slot)
    device = torch.device("cpu")
    seconds = [[timed(work, device) for work in works] for _ in range(4)]
    raw_write_s, write_s, raw_read_s, read_s = map(min, zip(*seconds[1:], strict=True))
    row("cache, write and fsync", write_s, "raw file", raw_write_s)
    row("cache, read and check", read_s, "raw file", raw_read_s)
    slot.close()


def main() -> None:
    """Print what the machine is and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; nothing was measured")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    workers = 1 if device.type == "cuda" else len(os.sched_getaffinity(0))
    level = torch.backends.cpu.get_cpu_capability()
    print(f"{name}, {level}, {workers} workers, torch {torch.__version__}")
    print(f"sizes: {options.size} x {options.size}, 3 bits, groups of {TILE}\n")
    print("| part | seconds | floor | ratio |\n|---|---|---|---|")
    with single_threaded_products(workers) as pool:
        solver(options.size, device, pool)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        cache(Path(folder))


if __name__ == "__main__":
    main()
