"""Extraction: what is missing of some folders is dealt out to any number of processes, and counted.

units = dealt(dist.broadcast(missing if dist.is_main else None), dist)
with counted(dist, log, "captions", total) as progress: ...
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import Logger
from typing import TypeVar

from tqdm import tqdm

from utils.distributed import Distributed

T = TypeVar("T")


def dealt(units: Sequence[T], dist: Distributed) -> list[T]:
    """Return this process's share: dealt out in turn, none has more than one more than another, in a resumed run either."""
    return [*units][dist.rank :: dist.world_size]


@contextmanager
def counted(
    dist: Distributed, log: Logger, unit: str, total: int, encoded: Callable[[], int] | None = None
) -> Iterator[tqdm]:
    """Show a bar of this process's progress; at the end log how many were encoded by all of them, and how fast.

    total: of the bar. encoded: tells how many of these this process encoded (default: all).
    """
    of_all = f" (process 1 of {dist.world_size})" if dist.world_size > 1 else ""
    started = time.monotonic()
    with tqdm(total=total, unit=unit, desc=f"encoding{of_all}", disable=not dist.is_main) as progress:
        yield progress
    done, seconds = sum(dist.gather(encoded() if encoded else total)), time.monotonic() - started
    if dist.is_main and done:
        log.info(f"encoded {done} {unit} in {seconds:.1f} s, {done / seconds:.1f} {unit}/s over all processes")
