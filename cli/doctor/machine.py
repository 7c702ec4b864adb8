"""What this machine is, measured and checked: each a line of ``doctor``."""

import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rsq_stream.errors import RsqError

from ..display.text import size

_PACKAGES = (
    "rsq-stream",
    "torch",
    "numba",
    "numpy",
    "transformers",
    "compressed-tensors",
    "zarr",
)


_PROBE_BYTES = 256 * 2**20


_SLACK = 1.0 + 1e-4
"""By how much a choice of the fast clip search may lose to its twin's: sums of
fp32 in another order."""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it passed, what was found."""

    name: str
    ok: bool | None
    """None where there is nothing to pass or fail."""
    found: str


def versions() -> list[Finding]:
    """Return the versions of Python and of the packages that matter."""
    found = [Finding("Python", None, platform.python_version())]
    for name in _PACKAGES:
        try:
            found.append(Finding(name, None, version(name)))
        except PackageNotFoundError:
            found.append(Finding(name, None, "absent"))
    there = find_spec("fast_hadamard_transform") is not None
    text = "importable" if there else "absent; only rotated inference elsewhere uses it"
    return [*found, Finding("fast-hadamard-transform", None, text)]


def machine() -> list[Finding]:
    """Return processor, memory and CUDA device."""
    import psutil
    import torch

    from rsq_stream.planning.devices import cores

    memory = psutil.virtual_memory()
    if torch.cuda.is_available():
        made = torch.cuda.get_device_properties(0)
        cuda = f"{made.name}, {size(made.total_memory)}, sm_{made.major}{made.minor}"
    else:
        cuda = "none that torch sees"
    level = torch.backends.cpu.get_cpu_capability()
    return [
        Finding("CPU", None, f"{platform.machine()} {level}, {cores()} cores to use"),
        Finding("memory", None, f"{size(memory.total)}, {size(memory.available)} free"),
        Finding("CUDA", None, cuda),
    ]


def kernels() -> list[Finding]:
    """Compile, check and time the CUDA kernels; only compile where no device is."""
    import torch

    from .kernels import compiled, on_device, without_device

    if not torch.cuda.is_available():
        return [Finding("CUDA kernels", None, without_device())]
    major, minor = torch.cuda.get_device_capability()
    return [
        checked("CUDA kernels", lambda: compiled(f"sm_{major}{minor}")),
        *(checked(name, check) for name, check in on_device("cuda")),
    ]


def checked(name: str, check: Callable[[], str]) -> Finding:
    """Run one check; whatever goes wrong in it is its result."""
    try:
        return Finding(name, True, check())
    except (RsqError, OSError, ArithmeticError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(name, False, reason)


def disk_speed(folder: Path) -> str:
    """Write and read back a slot of activations; the files are removed."""
    import torch

    from rsq_stream.storage.activation_cache import Slot
    from rsq_stream.storage.activation_shape import SlotShape
    from rsq_stream.storage.direct_io import has_direct_io

    free = shutil.disk_usage(folder).free
    if free < 2 * _PROBE_BYTES:
        raise OSError(f"{folder.resolve()}: only {size(free)} free")
    sequences = _PROBE_BYTES // (512 * 2048 * torch.float32.itemsize)
    shape = SlotShape(
        sequences, tokens=512, width=2048, unit_sequences=2, dtype=torch.float32
    )
    x_BTD = torch.randn(shape.unit_shape(0), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix=".rsq-stream-doctor-", dir=folder) as probe:
        direct = has_direct_io(Path(probe))
        slot = Slot(Path(probe) / "slot", shape, 0, 4, direct=direct)
        try:
            began = time.monotonic()
            for unit in range(shape.units):
                slot.write(unit, x_BTD, durable=True)
            slot.flush(durable=True)
            written_s = time.monotonic() - began
            began = time.monotonic()
            same = all(torch.equal(x, x_BTD) for x in slot.read(range(shape.units)))
            read_s = time.monotonic() - began
        finally:
            slot.close()
    if not same:
        raise ArithmeticError("what was read is not what was written")
    rate = [shape.slot_bytes / 2**20 / seconds for seconds in (written_s, read_s)]
    kind = "direct I/O" if direct else "no direct I/O: buffered, reads may be cached"
    return f"{rate[0]:.0f} MiB/s written, {rate[1]:.0f} MiB/s read; {kind}"


def check_sweep() -> str:
    """Compare the compiled sweep with its twin: every code and error must be equal."""
    import torch

    from rsq_stream.ops.column_sweep import sweep, sweep_naive

    random = torch.Generator().manual_seed(0)
    weight_RC = torch.randn(63, 128, generator=random)
    upper_CC = torch.randn(128, 128, generator=random).triu(1) / 16
    scale_R = torch.rand(63, generator=random) + 0.25
    zero_R = torch.full((63,), 4.0)
    level_RL = (torch.arange(8.0) - zero_R[:, None]) * scale_R[:, None]
    given = (weight_RC, upper_CC, scale_R, zero_R, level_RL)
    made, twin = sweep(weight_RC, *given), sweep_naive(weight_RC, *given)
    differing = int((made.code_RC != twin.code_RC).sum())
    if differing or not torch.equal(made.error_RC, twin.error_RC):
        raise ArithmeticError(f"{differing} of {made.code_RC.numel()} codes differ")
    return f"{made.code_RC.numel()} codes are equal"


def check_clip_search() -> str:
    """Compare the compiled clip search with its twin, by the error of what it chose."""
    import torch
    from torch import Tensor

    from rsq_stream.ops.clip_search import best_scale, best_scale_naive

    random = torch.Generator().manual_seed(0)
    target_RC = torch.randn(63, 100, generator=random)
    full_R = target_RC.abs().amax(dim=1) / 3
    scale_RP = full_R[:, None] * (1 - 0.01 * torch.arange(80))
    zero_R = torch.full((63,), 4.0)

    def error_of(best_R: Tensor) -> Tensor:
        index_R = torch.where(best_R < 0, -1 - best_R, best_R)
        scale_R = scale_RP.gather(1, index_R[:, None])[:, 0].double()
        scale_R1 = torch.where(best_R < 0, -scale_R, scale_R)[:, None]
        code_RC = (torch.round(target_RC.double() / scale_R1) + 4).clamp(0, 7)
        return (target_RC - scale_R1 * (code_RC - 4)).square().sum(dim=1)

    given = (target_RC, scale_RP, zero_R, 7, 2.0, True)
    fast_R, naive_R = best_scale(*given), best_scale_naive(*given)
    worse = error_of(fast_R) > error_of(naive_R) * _SLACK
    if worse.any():
        raise ArithmeticError(f"{int(worse.sum())} of 63 rows got a worse scale")
    equal = int((fast_R == naive_R).sum())
    return f"{equal} of 63 rows choose the same scale, none a worse one"
