"""Tensors that are kept lie in pages of their own: what comes and goes around them."""

import threading

import psutil
import pytest
import torch
from torch import Tensor

from rsq_stream.runtime.tensor_arena import TensorArena

MIB = 1 << 20
SIZES = [(1,), (63, 137), (2, 5, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SIZES)
def test_what_is_got_is_what_was_put(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    kept = [torch.randn(shape).to(dtype) for _ in range(3)]
    pages = TensorArena(3, kept[0].numel() * dtype.itemsize)
    assert 0 not in pages
    for number in (2, 0, 1):
        pages.put(number, kept[number])
    pages.put(1, kept[1])
    assert all(torch.equal(pages.get(n), kept[n]) for n in range(3))
    assert torch.equal(pages.take(1), kept[1])
    assert [n in pages for n in range(3)] == [True, False, True]
    assert torch.equal(pages.get(2), kept[2])
    pages.clear()
    assert not any(n in pages for n in range(3))


def test_a_copy_is_kept_and_strides_do_not_matter() -> None:
    x_AB = torch.arange(6.0).view(2, 3)
    pages = TensorArena(1, 24)
    pages.put(0, x_AB.T)
    x_AB.zero_()
    assert torch.equal(pages.get(0), torch.arange(6.0).view(2, 3).T)


def test_what_somebody_holds_outlives_its_pages() -> None:
    pages = TensorArena(2, 4 * MIB)
    for number in range(2):
        pages.put(number, torch.full((MIB,), float(number)))
    held = pages.get(1)
    pages.clear()
    pages.put(1, torch.zeros(MIB))
    assert bool((held == 1).all())


def test_several_threads_put_at_once() -> None:
    pages, ready = TensorArena(32, 4096), threading.Barrier(4)

    def some(first: int) -> None:
        ready.wait()
        for number in range(first, 32, 4):
            pages.put(number, torch.full((1024,), float(number)))

    threads = [threading.Thread(target=some, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bool((pages.get(n) == n).all()) for n in range(32))


def passed(x_TI: Tensor) -> Tensor:
    """Compute as a block does, with temporary tensors of several sizes."""
    wide = torch.cat([x_TI.float()] * 3, dim=1)
    return (wide * wide.sigmoid())[:, : x_TI.shape[1]].to(x_TI.dtype)


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_kept_tensors_take_their_size() -> None:
    """In the heap, one after the other, they take three times as much."""
    x_TI, count = torch.randn(2048, 256).bfloat16(), 256
    pages = TensorArena(count, MIB)
    for _ in range(8):  # until the allocator's threshold is where it stays
        passed(x_TI)
    before = resident()
    for number in range(count):
        pages.put(number, passed(x_TI))
    assert resident() - before < 1.2 * count * MIB
    for number in range(count):
        pages.take(number)
    assert resident() - before < 0.2 * count * MIB
