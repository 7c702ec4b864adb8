"""How fast this machine is at what a run is made of: measured in about a second.

Products, factorisation, solver, attention, elementwise work and disk, each in the form
that a run uses. A first call that has to compile takes longer.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from rsq_stream.algorithm.gptq.hessian import Hessian
from rsq_stream.algorithm.gptq.ldl import Factor, factorise
from rsq_stream.algorithm.gptq.solver import solve
from rsq_stream.algorithm.grids._planned import make_grid
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.ops.column_sums import column_sums
from rsq_stream.runtime.worker_pool import Pool, single_threaded_products
from rsq_stream.storage.atomic import sync_file
from rsq_stream.storage.direct_io import (
    aligned_empty,
    has_direct_io,
    read_chunk,
    write_chunk,
)

_SIZE, _GPU_SIZE = 512, 4096
"""Order of the matrices that are timed."""
_HEADS, _TOKENS = 4, 1024
_DISK_BYTES = 32 << 20
_GPU_TIMES = 4


@dataclass(frozen=True, kw_only=True)
class MachineSpeed:
    """Work in a second, of all workers together."""

    products: float
    """Flops of matrix products."""
    factored: float
    """Entries of H factored, products not counted."""
    weights: float
    """Weights solved, products not counted."""
    scores: float
    """Entries of the causal half of an attention map."""
    sums: float
    """The same, for the column sums of importance."""
    values: float
    """Values of an elementwise function such as silu(x) y."""
    written: float
    """Bytes to disk, durably; infinite where no folder can be written."""
    read: float
    """Bytes from disk."""


def measure_speed(
    plan: QuantizationPlan, device: torch.device, workers: int, folder: Path
) -> MachineSpeed:
    """Time a little of everything; a file in ``folder`` is made and removed."""
    size = _GPU_SIZE if device.type == "cuda" else _SIZE
    compute = getattr(torch, plan.compute_type)
    with single_threaded_products(workers) as pool:
        clock = _Clock(pool, device)
        square = torch.ones(size, size, dtype=compute, device=device)
        products = clock.rate(2.0 * size**3, lambda: square @ square)
        values = clock.rate(
            float(size * size), lambda: torch.nn.functional.silu(square) * square
        )
        heads = torch.ones(1, _HEADS, _TOKENS, 128, dtype=compute, device=device)
        half = _HEADS * _TOKENS**2 / 2
        scores = clock.rate(
            half, lambda: scaled_dot_product_attention(*(heads,) * 3, is_causal=True)
        )
        sums = clock.rate(half, lambda: column_sums(heads, heads, 0.1))
        factor_s, factor = _factor_seconds(plan, size, pool, device)
        solved = _solved_weights(plan, factor, products, pool)
    written, read = _disk(folder)
    return MachineSpeed(
        products=products,
        factored=size**2 / max(factor_s - size**3 / 3 / products, 0.05 * factor_s),
        weights=solved,
        scores=scores,
        sums=sums,
        values=values,
        written=written,
        read=read,
    )


@dataclass
class _Clock:
    """Times a function, done by each worker at once."""

    pool: Pool
    device: torch.device

    def rate(self, work: float, function: Callable[[], object]) -> float:
        """Return work a second, the better of two times."""
        workers = self.pool.workers
        times = range(workers * (_GPU_TIMES if self.device.type == "cuda" else 1))

        def once() -> None:
            self.pool.map(lambda _: function(), times)

        seconds = min(timed(once, self.device) for _ in range(2))
        return work * len(times) / seconds


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(1e-9, time.perf_counter() - began)


def _factor_seconds(
    plan: QuantizationPlan, size: int, pool: Pool, device: torch.device
) -> tuple[float, Factor]:
    """Factorise twice: what is compiled at first does not count."""
    made: list[Factor] = []

    def once() -> None:
        hessian = Hessian(size, plan.hessian_panel, device)
        hessian.matrix_II.fill_(0.1).diagonal().fill_(1.0)
        made.append(factorise(hessian, plan.damping, plan.tile_columns, pool))

    return min(timed(once, device) for _ in range(2)), made[-1]


def _solved_weights(
    plan: QuantizationPlan, factor: Factor, products: float, pool: Pool
) -> float:
    """Solve a tile of rows for each worker; gives weights a second."""
    inputs, device = len(factor.scale_I), factor.scale_I.device
    rows = min(plan.tile_rows_of(inputs), inputs) * pool.workers
    # Spread evenly over the grid, in an order that is not a line.
    entry = torch.arange(rows * inputs, dtype=torch.int64, device=device)
    weight_OI = ((entry * 7919 % 10007).float() / 10007 - 0.5).reshape(rows, inputs)
    grid = make_grid(plan, plan.bits, torch.bfloat16)

    def once() -> None:
        solve(
            weight_OI,
            factor,
            grid,
            plan.group_size,
            dynamic_scales=plan.group_scales == "dynamic",
            tile_rows=plan.tile_rows_of(inputs),
            pool=pool,
            sweeps=plan.sweeps,
            refit=plan.refit,
        )

    seconds = min(timed(once, device) for _ in range(2))
    in_products = solve_flops(plan, rows, inputs) / products
    return rows * inputs / max(seconds - in_products, 0.05 * seconds)


def solve_flops(plan: QuantizationPlan, outputs: int, inputs: int) -> float:
    """Count the products of solving a linear, its correction not included.

    O I^2 of the sweep's own, three losses, and two for each round of refit and descent.
    """
    rounds = max(plan.sweeps, int(plan.refit))
    return (1 + 3 + 2 * rounds) * float(outputs) * inputs**2


def _disk(folder: Path) -> tuple[float, float]:
    """Write a chunk durably and read it back, as the activation cache does."""
    try:
        with tempfile.TemporaryDirectory(prefix=".rsq-stream-", dir=folder) as probe:
            direct = has_direct_io(Path(probe))
            path = Path(probe) / "chunk"
            content, here = aligned_empty(_DISK_BYTES), torch.device("cpu")
            content.fill(1)

            def write() -> None:
                write_chunk(path, content, direct=direct)
                sync_file(path)

            write_s = timed(write, here)
            read_s = timed(lambda: read_chunk(path, _DISK_BYTES, direct=direct), here)
    except OSError:
        return float("inf"), float("inf")
    return _DISK_BYTES / write_s, _DISK_BYTES / read_s
