"""Work side by side in threads, and how many of them torch may use.

Torch splits every operation among its threads and waits for all of them. Where operations are many
and short, and a core is busy with something else, the waiting takes longer than the work: it is
better to give each thread a long piece of its own.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` in as many threads as torch has, each with a single thread of torch's.

    Results come in order, and few more than there are threads wait to be taken.
    """
    count = torch.get_num_threads()
    if count == 1:
        yield from map(function, items)
        return
    with compute_threads(1), ThreadPoolExecutor(count) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def compute_threads(count: int) -> Iterator[None]:
    """So many threads for torch's operations; as many as before at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
