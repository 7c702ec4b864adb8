"""A fixed-order pool of single-threaded workers.

The bytes of the output must not depend on how many cores took part. Libraries
split a product by the number of threads, so here every product is computed by
one thread, and threads share out whole units, panels and tiles instead.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool:
    """Workers that map a function over items; results come in the items' order."""

    def __init__(self, workers: int, check: Callable[[], None] = lambda: None) -> None:
        """Call ``check`` before each item; what it raises ends the map."""
        self.workers = workers
        self._check = check
        self._executor = (
            ThreadPoolExecutor(
                workers, "rsq", initializer=torch.set_num_threads, initargs=(1,)
            )
            if workers > 1
            else None
        )

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> list[Result]:
        """Apply the function to all items and wait for all of them."""

        def checked(item: Item) -> Result:
            self._check()
            return function(item)

        if self._executor is None:
            return [checked(item) for item in items]
        return list(self._executor.map(checked, items))

    def close(self) -> None:
        """Stop the workers; the pool cannot be used afterwards."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


@contextmanager
def single_threaded_products(
    workers: int, check: Callable[[], None] = lambda: None
) -> Iterator[Pool]:
    """Return a pool, with torch's own threading off until the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Pool(workers, check)
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)
