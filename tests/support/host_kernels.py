"""Run the kernels' own sources on the CPU, through g++ and ``cuda_on_host.h``."""

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rsq_stream.ops.cuda.cubin_cache import Kernel, source_of
from rsq_stream.ops.cuda.launch import Argument, LaunchGrid, check_grid, packed

HEADER = Path(__file__).with_name("cuda_on_host.h")
GUARD_BYTES = 256
POISON = 0x7F
"""Of fp32 and bf16 a huge number, of codes an absurd one."""

_START = f"""
#include "{HEADER.name}"
float pool[1 << 16];
static int spoiled(long long floats)
{{
    for (long long at = floats; at < (1 << 16); ++at)
        if (pool[at] == pool[at]) return 1;
    return 0;
}}
"""
_RUN = """
extern "C" int run_%s(const unsigned *grid, unsigned threads, void **values,
                      long long shared)
{
    for (float &entry : pool) entry = NAN;
    host::launch(%s, grid, threads, values);
    return spoiled(shared / 4);
}
"""

_guarded: list[tuple[Tensor, int]] = []


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++")


def output(shape: Sequence[int], dtype: torch.dtype, device: object) -> Tensor:
    """Poisoned memory, with guards before and after."""
    del device
    count = int(torch.Size(shape).numel())
    size = count * dtype.itemsize
    buffer = torch.full((size + 2 * GUARD_BYTES,), POISON, dtype=torch.uint8)
    _guarded.append((buffer, size))
    inside = buffer[GUARD_BYTES : GUARD_BYTES + size]
    return inside.view(dtype).view(tuple(shape))


def require_guards() -> None:
    """Fail if a kernel wrote beside what it was given."""
    for buffer, size in _guarded:
        around = torch.cat([buffer[:GUARD_BYTES], buffer[GUARD_BYTES + size :]])
        assert bool((around == POISON).all()), "a kernel wrote outside of its output"
    _guarded.clear()


def launch(
    kernel: Kernel, grid: LaunchGrid, threads: int, arguments: Sequence[Argument]
) -> None:
    """Take the place of ``ops.launch.launch``."""
    check_grid(kernel, grid)
    for value in arguments:
        assert not isinstance(value, Tensor) or value.device.type == "cpu"
    values = packed(arguments)
    pointers = (ctypes.c_void_p * len(values))(*(map(ctypes.addressof, values)))
    program = getattr(_library(kernel.source, kernel.defines), f"run_{kernel.function}")
    shared = ctypes.c_longlong(kernel.shared_bytes)
    done = program((ctypes.c_uint * 3)(*grid), threads, pointers, shared)
    assert done == 0, "the kernel wrote beyond its shared memory"
    require_guards()


@cache
def _library(source: str, defines: tuple[str, ...]) -> ctypes.CDLL:
    """Compile one source with its sizes, all of its kernels."""
    text = source_of(source)
    kernels = re.findall(r'extern "C" __global__[^(]*(?:\([^)]*\))?\s(\w+)\(', text)
    parts = [
        _START,
        f'#include "{source}.cu"',
        *(_RUN % (name, name) for name in kernels),
    ]
    with tempfile.TemporaryDirectory(prefix="rsq-stream-host-") as folder:
        # Shared memory of the launch's size is one array, not one per function.
        sized = text.replace("extern __shared__", "extern")
        Path(folder, f"{source}.cu").write_text(sized)
        Path(folder, "run.cpp").write_text("\n".join(parts))
        command = [
            str(compiler()),
            "-std=c++17",
            "-O1",
            "-march=native",
            "-fPIC",
            "-shared",
            "-w",
        ]
        command += ["-ffp-contract=off", *(f"-D{define}" for define in defines)]
        command += ["-I", folder, "-I", str(HEADER.parent), "-o", f"{folder}/run.so"]
        command += [f"{folder}/run.cpp"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(f"{folder}/run.so")
