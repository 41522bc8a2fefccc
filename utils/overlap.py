"""Work in a thread beside what makes it."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def one_behind(items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """Yield work(item) of each item, in order, computed in a thread while the next item is made.

    No more than one item waits for the thread. What making an item or the work raises ends the iteration; a work that has
    begun is waited for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="one-behind") as thread:
        before = None
        for item in items:
            now = thread.submit(work, item)
            if before is not None:
                yield before.result()
            before = now
        if before is not None:
            yield before.result()
