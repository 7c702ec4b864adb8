"""Activations between host and GPU: the same ones, whatever is done when."""

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsq_stream.errors import DamagedError, NumericalError
from rsq_stream.pipeline.activations import calibration_pass, finite_check, slots
from rsq_stream.pipeline.activations.finite_check import FiniteWatch
from rsq_stream.runtime import transfers
from rsq_stream.runtime.copy_stream import SideStream, pinned_bytes
from rsq_stream.runtime.transfers import ToDevice, ToHost, Transfers, pinned_total
from rsq_stream.storage.activation_cache import Slot
from rsq_stream.storage.activation_shape import SlotShape
from tests.support.fake_copies import (
    FakeCopies,
    FakeDevice,
    FakeMoment,
    take_a_gpus_way,
)
from tests.support.toy import contents, run_toy, toy_checkpoint

UNIT = (2, 3, 4)
UNIT_BYTES = 2 * 3 * 4 * 4
SCHEDULES = 30


def unit_of(number: int) -> Tensor:
    return torch.arange(24, dtype=torch.float32).view(UNIT) + 100 * number


def fill(unit: int, buffer: Tensor) -> Tensor:
    x_BTD = unit_of(unit)
    return buffer[: x_BTD.nbytes].view(torch.float32).view(UNIT).copy_(x_BTD)


@contextmanager
def inbound_of(copies: FakeCopies, in_flight: int) -> Iterator[ToDevice]:
    made = ToDevice(copies, UNIT_BYTES, in_flight)
    try:
        yield made
    finally:
        made.close()


def taken_by_runs(
    fake: FakeDevice, inbound: ToDevice, units: int, in_flight: int
) -> list[Tensor]:
    """Take units as a pass does: a run, its compute, and what comes of it."""
    seen: list[Tensor] = []
    reads = inbound.arriving(range(units), fill, in_flight)
    for first in range(0, units, in_flight):
        run = [next(reads) for _ in range(min(in_flight, units - first))]
        for x_BTD in run:
            fake.launch(partial(copied, seen, x_BTD))
        for x_BTD in run:  # what the pass makes of its results
            fake.launch(partial(copied, seen, x_BTD))
    fake.drain()
    return seen


def copied(seen: list[Tensor], x_BTD: Tensor) -> None:
    """Stand for compute: it sees what is there when its turn comes."""
    seen.append(x_BTD.clone())


def expected_of(units: int, in_flight: int) -> list[Tensor]:
    found: list[Tensor] = []
    for first in range(0, units, in_flight):
        run = range(first, min(first + in_flight, units))
        found += 2 * [unit_of(unit) for unit in run]
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("units", [0, 1, 7])
def test_units_arrive_whatever_is_done_when(units: int, in_flight: int) -> None:
    for seed in range(SCHEDULES):
        fake = FakeDevice(seed)
        copies = FakeCopies(fake)
        with inbound_of(copies, in_flight) as inbound:
            for shorter in (in_flight, max(1, in_flight // 2)):  # after memory ran out
                seen = taken_by_runs(fake, inbound, units, shorter)
                assert same(seen, expected_of(units, shorter))
        assert copies.made_bytes == (in_flight + 1) * UNIT_BYTES * (units > 0)


def unordered(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Leave out one of the waits that keep the order."""
    if what == "a buffer is filled before it was copied":
        monkeypatch.setattr(transfers, "_filled", lambda at, u, f: f(u, at.buffer))
    elif what == "memory is filled before its compute":
        known, begin = FakeCopies.copy, FakeMoment(FakeDevice())
        begin.reach()
        monkeypatch.setattr(
            FakeCopies,
            "copy",
            lambda self, target, source, after: known(self, target, source, begin),
        )
    else:
        monkeypatch.setattr(FakeCopies, "hold_compute", lambda self, until: None)


@pytest.mark.parametrize(
    "what",
    [
        "a buffer is filled before it was copied",
        "memory is filled before its compute",
        "compute comes before its copy",
    ],
)
def test_each_wait_is_needed(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The schedules find it when one is not there."""
    unordered(monkeypatch, what)
    sound = True
    for seed in range(SCHEDULES):
        fake = FakeDevice(seed)
        with inbound_of(FakeCopies(fake), 2) as inbound:
            sound &= same(taken_by_runs(fake, inbound, 9, 2), expected_of(9, 2))
    assert not sound


@pytest.mark.parametrize("in_flight", [1, 3])
def test_the_next_run_arrives_while_this_one_computes(in_flight: int) -> None:
    fake = FakeDevice()
    with inbound_of(FakeCopies(fake), in_flight) as inbound:
        reads = inbound.arriving(range(4 * in_flight), fill, in_flight)
        first = [next(reads) for _ in range(in_flight)]
        done = threading.Event()
        fake.compute.append(done.is_set)  # it is long
        second = [next(reads) for _ in range(in_flight)]
        fake.run_until(lambda: fake.log.count("copied") == 2 * in_flight)
        assert not done.is_set()
        for unit, x_BTD in enumerate(first + second):
            assert torch.equal(x_BTD, unit_of(unit))
        done.set()
        fake.drain()


def test_what_filling_raises_comes_where_the_unit_is_asked_for() -> None:
    def failing(unit: int, buffer: Tensor) -> Tensor:
        if unit == 2:
            raise DamagedError("damaged", "x")
        return fill(unit, buffer)

    fake = FakeDevice()
    with inbound_of(FakeCopies(fake), 2) as inbound:
        reads = inbound.arriving(range(5), failing, 2)
        assert [torch.equal(next(reads), unit_of(0)), bool(next(reads).numel())]
        with pytest.raises(DamagedError):
            next(reads)
        # The next pass begins anew, whatever was under way.
        assert same(taken_by_runs(fake, inbound, 5, 2), expected_of(5, 2))


def test_an_older_pass_gives_nothing_more() -> None:
    with inbound_of(FakeCopies(FakeDevice()), 1) as inbound:
        older = inbound.arriving(range(3), fill, 1)
        next(older)
        next(inbound.arriving(range(3), fill, 1))
        with pytest.raises(RuntimeError, match="another pass"):
            next(older)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_units_leave_whatever_is_done_when(in_flight: int) -> None:
    for seed in range(SCHEDULES):
        fake = FakeDevice(seed)
        copies = FakeCopies(fake)
        outbound = ToHost(copies, UNIT_BYTES, in_flight)
        seen: list[Tensor] = []

        def keep(leaving: transfers.PendingCopy, seen: list[Tensor] = seen) -> None:
            with leaving.landed() as buffer:
                seen.append(buffer.view(torch.float32).view(UNIT).clone())

        with ThreadPoolExecutor(1) as writer:
            for unit in range(9):
                x_BTD = torch.full(UNIT, torch.nan)
                fake.launch(partial(x_BTD.copy_, unit_of(unit)))
                assert outbound.carries(x_BTD)
                writer.submit(keep, outbound.take(x_BTD))
        assert same(seen, [unit_of(unit) for unit in range(9)])
        assert copies.made_bytes <= (in_flight + 1) * UNIT_BYTES


def test_memory_is_not_handed_on_before_it_was_copied() -> None:
    fake = FakeDevice()
    outbound = ToHost(FakeCopies(fake), UNIT_BYTES, 1)
    x_BTD = unit_of(1)
    known = weakref.ref(x_BTD)
    leaving = outbound.take(x_BTD)
    del x_BTD
    assert leaving._x is known()
    with leaving.landed():
        assert leaving._x is None
    fake.drain()
    assert known() is None


def test_a_buffer_comes_back_after_an_error() -> None:
    outbound = ToHost(FakeCopies(FakeDevice()), UNIT_BYTES, 1)
    for _ in range(5):
        with pytest.raises(OSError, match="full"), outbound.take(unit_of(0)).landed():
            raise OSError("full")


@contextmanager
def slot_beside(
    folder: Path, shape: SlotShape, resident: int, fake: FakeDevice
) -> Iterator[Slot]:
    sizes = shape.unit_bytes, 2
    ways = Transfers(
        ToDevice(FakeCopies(fake), *sizes), ToHost(FakeCopies(fake), *sizes)
    )
    slot = Slot(folder, shape, resident, 2, direct=False, transit=ways)
    try:
        yield slot
    finally:
        ways.inbound.close()
        slot.close()


@pytest.mark.parametrize("resident", [0, 2, 3])
@pytest.mark.parametrize("durable", [True, False])
def test_a_slot_holds_what_went_through(
    tmp_path: Path, resident: int, durable: bool
) -> None:
    """The same files and checksums as on the straight way."""
    shape = SlotShape(7, 5, 12, 3, torch.bfloat16)
    written = [torch.randn(shape.unit_shape(u)).bfloat16() for u in range(3)]
    plain = Slot(tmp_path / "plain", shape, resident, 2, direct=False)
    fake = FakeDevice(lazy=False)
    with slot_beside(tmp_path / "beside", shape, resident, fake) as slot:
        for made in (plain, slot):
            for unit, x_BTD in enumerate(written):
                made.write(unit, x_BTD, durable=durable)
            made.flush(durable=durable)
        assert slot.checksums == plain.checksums
        assert contents(tmp_path / "beside") == contents(tmp_path / "plain")
        for first in range(0, 3, 2):
            reads = slot.arriving(range(first, 3), 2)
            for x_BTD, known in zip(reads, written[first:], strict=True):
                assert torch.equal(x_BTD, known)
        assert same(list(slot.read(range(3))), written)
    plain.close()


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    shape = SlotShape(3, 5, 12, 1, torch.float32)
    with slot_beside(tmp_path / "x", shape, 0, FakeDevice(lazy=False)) as slot:
        for unit in range(3):
            slot.write(unit, torch.ones(shape.unit_shape(unit)), durable=True)
        slot.flush(durable=True)
        (tmp_path / "x" / "c.1.0.0").write_bytes(bytes(shape.unit_bytes))
        with pytest.raises(DamagedError, match=r"c\.1\.0\.0"):
            list(slot.arriving(range(3), 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("looks", [True, False])
def test_a_bad_place_is_named(
    monkeypatch: pytest.MonkeyPatch, looks: bool, bad: float
) -> None:
    monkeypatch.setattr(finite_check, "_looks_at_each_unit", lambda _: looks)
    watch = FiniteWatch(3, "mlp in", sequences=6, tokens=5, device=torch.device("cpu"))
    x_BTD = torch.full((2, 5, 7), 3e38)  # finite, but its sum is not
    watch.see(x_BTD, 0)
    watch.require()
    x_BTD[1, 4, 6] = bad
    x_BTD[1, 3, 0] = bad

    def pass_over() -> None:
        watch.see(x_BTD, 4)
        watch.see(torch.zeros(2, 5, 7), 2)
        watch.require()

    with pytest.raises(NumericalError, match=r"block 3, mlp in, sequence 5, token 3:"):
        pass_over()


RUN: dict[str, Any] = {"method": "rsq", "propagate": 0.5}


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("resident", [0, 1, 9])
def test_a_run_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_flight: int, resident: int
) -> None:
    toy = toy_checkpoint(tmp_path / "toy", blocks=2, dtype=torch.bfloat16)
    execution = {"in_flight": in_flight, "resident_units": resident}
    run_toy(toy, tmp_path / "plain", execution=execution, **RUN)
    fake = take_a_gpus_way(monkeypatch, in_flight)
    run_toy(toy, tmp_path / "beside", execution=execution, **RUN)
    # Five passes over three units of two streams, in two blocks: read, and some kept.
    assert fake.log.count("copied") >= 5 * 3 * 2 * 2
    made = (contents(tmp_path / name) for name in ("plain", "beside"))
    assert next(made) == next(made)


def test_what_is_planned_for_buffers() -> None:
    assert [pinned_bytes(size) for size in (1, 2, 3, 4096, 4097)] == [
        *(1, 2, 4, 4096, 8192)
    ]
    assert pinned_total(3000, 2, 2) == 2 * 2 * 3 * 4096


def gpu_copies() -> SideStream:
    return SideStream(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_gpu_orders_copies_and_compute(in_flight: int) -> None:
    """Slow compute, quick copies: each unit is seen before its memory gets another."""
    shape, units = (1, 64, 1024), 16
    size = 64 * 1024 * 4

    def own(unit: int, buffer: Tensor) -> Tensor:
        x_BTD = buffer.view(torch.float32).view(shape)
        return x_BTD.fill_(float(unit))

    inbound = ToDevice(gpu_copies(), size, in_flight)
    outbound = ToHost(gpu_copies(), size, in_flight)
    busy = torch.randn(4096, 4096, device="cuda")
    landed: list[float] = []

    def keep(leaving: transfers.PendingCopy) -> None:
        with leaving.landed() as buffer:
            values = buffer.view(torch.float32)
            assert bool((values == values[0]).all())
            landed.append(float(values[0]))

    with ThreadPoolExecutor(1) as writer:
        for x_BTD in inbound.arriving(range(units), own, in_flight):
            busy = (busy @ busy).clamp(-1, 1)
            writer.submit(keep, outbound.take(x_BTD + 1))
    inbound.close()
    assert landed == [unit + 1.0 for unit in range(units)]


@pytest.mark.gpu
def test_a_run_on_a_gpu_has_the_bytes_of_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that goes beside the compute, the solver's weights there; or neither."""
    toy = toy_checkpoint(tmp_path / "toy", blocks=2, dtype=torch.bfloat16)
    for name, aside in (("plain", False), ("beside", True)):
        monkeypatch.setattr(slots, "copies_aside", lambda _, aside=aside: aside)
        run_toy(
            toy,
            tmp_path / name,
            plan={"compute_type": "bfloat16"},
            options={"device": "cuda"},
            execution={
                "in_flight": 2,
                "resident_units": 1,
                "prefetches_blocks": aside,
                "keeps_solver_weights_on_gpu": aside,
            },
            **RUN,
        )
    made = [contents(tmp_path / name, "*.safetensors") for name in ("plain", "beside")]
    assert made[0] == made[1]


@pytest.mark.gpu
def test_a_pass_on_a_gpu_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second block: kernels and libraries are loaded in the first."""
    toy = toy_checkpoint(tmp_path / "toy", blocks=2, dtype=torch.bfloat16)
    known = calibration_pass.CalibrationPasses.run
    quiet: list[str] = []

    def strict(self: Any, *given: Any) -> Iterator[Any]:
        block, stage = given[1:3]
        runs = known(self, *given)
        if block == 0:
            yield from runs
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from runs
        finally:
            torch.cuda.set_sync_debug_mode("default")
        quiet.append(stage)

    monkeypatch.setattr(calibration_pass.CalibrationPasses, "run", strict)
    run_toy(
        toy,
        tmp_path / "out",
        plan={"compute_type": "bfloat16"},
        options={"device": "cuda"},
        execution={"in_flight": 1, "resident_units": 2},
        **RUN,
    )
    assert len(quiet) == 6  # four stages, and the outputs of each stream
