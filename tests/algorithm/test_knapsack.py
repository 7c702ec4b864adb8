"""Which options the least sum of costs takes, against trying all of them."""

import itertools
import random

import pytest

from rsq_stream.algorithm import knapsack
from rsq_stream.algorithm.knapsack import Item, allocate


def best_of_all(units: list[Item], budget: int) -> tuple[float, int] | None:
    """Return the least cost, and the least size that has it."""
    found = []
    for options in itertools.product(*(range(len(unit.sizes)) for unit in units)):
        size = sum(u.sizes[o] for u, o in zip(units, options, strict=True))
        if size <= budget:
            found.append(
                (sum(u.costs[o] for u, o in zip(units, options, strict=True)), size)
            )
    return min(found, default=None)


def some_units(seed: int, step: int) -> list[Item]:
    generator = random.Random(seed)
    made = []
    for _ in range(generator.randint(1, 5)):
        options = generator.randint(1, 4)
        sizes = sorted(generator.sample(range(1, 30), options))
        costs = sorted((generator.random() for _ in range(options)), reverse=True)
        made.append(Item(tuple(step * size for size in sizes), tuple(costs)))
    return made


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all(seed: int, step: int) -> None:
    units = some_units(seed, step)
    generator = random.Random(seed)
    for _ in range(5):
        budget = step * generator.randint(0, 100) + generator.randint(0, step - 1)
        options, expected = allocate(units, budget), best_of_all(units, budget)
        if expected is None:
            assert options is None
            continue
        assert options is not None
        cost = sum(u.costs[o] for u, o in zip(units, options, strict=True))
        size = sum(u.sizes[o] for u, o in zip(units, options, strict=True))
        assert size <= budget
        assert cost == pytest.approx(expected[0])


def test_equal_costs_take_the_smaller_size() -> None:
    flat = Item((2, 3, 4), (0.0, 0.0, 0.0))
    assert allocate([flat, flat], 100) == [0, 0]


def test_nothing_to_choose() -> None:
    assert allocate([], 0) == []
    assert allocate([], -1) is None
    assert allocate([Item((5,), (1.0,))], 5) == [0]
    assert allocate([Item((5,), (1.0,))], 4) is None


def test_coarse_cells_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes without a common divisor: rounded up, so never too large, nearly best."""
    monkeypatch.setattr(knapsack, "_LARGEST_CELLS", 300)
    generator = random.Random(0)
    units = [
        Item(
            tuple(base + k * (1000 + generator.randint(0, 9)) for k in range(4)),
            tuple(base / 4**k for k in range(4)),
        )
        for base in (generator.randint(100, 999) for _ in range(5))
    ]
    budget = sum(unit.sizes[1] for unit in units) + 500
    options = allocate(units, budget)
    assert options is not None
    assert sum(u.sizes[o] for u, o in zip(units, options, strict=True)) <= budget
    cost = sum(u.costs[o] for u, o in zip(units, options, strict=True))
    exact = best_of_all(units, budget)
    assert exact is not None
    assert cost <= 1.2 * exact[0]


def test_as_many_units_as_a_large_model_has() -> None:
    """80 blocks of 4 groups at 6 options: a matter of seconds, exact in its cells."""
    generator = random.Random(1)
    bits = (2, 3, 4, 5, 6, 8)
    sizes = {size: tuple(size * b for b in bits) for size in (5, 4, 28, 14)}
    units = [
        Item(sizes[size], tuple(generator.random() / 4**b for b in bits))
        for _ in range(80)
        for size in sizes
    ]
    budget = int(2.5 * 80 * sum(sizes))
    options = allocate(units, budget)
    assert options is not None
    assert budget - 3 <= sum(u.sizes[o] for u, o in zip(units, options, strict=True))
