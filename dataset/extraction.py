"""Extraction: what is missing of some folders is dealt out to any number of processes, read, encoded, written and counted.

extract_missing(dist, log, "images", missing, read, encode, write)
"""

import time
from collections.abc import Callable, Hashable, Iterable
from itertools import groupby
from logging import Logger
from typing import Any

from tqdm import tqdm

from utils.distributed import Distributed

Batch = tuple[Hashable, range]
"""A unit that is written as one, such as a shard of a folder; the numbers of some of its items in the data set."""


def extract_missing(
    dist: Distributed,
    log: Logger,
    word: str,
    missing: Callable[[], list[Batch]],
    read: Callable[[list[range]], Iterable[Any]],
    encode: Callable[[Any], Any],
    write: Callable[[Any, list[Any]], int],
) -> None:
    """Read, encode and write the missing units, each process its share. Every process calls it.

    Args:
        word: for the items, in the log.
        missing: returns the batches of all units that are not there whole, one unit after the other.
        read: yields what is read of each batch, by one loader for all units.
        encode: takes what is read of a batch.
        write: takes a unit and its encoded batches, returns how many items it holds.
    """
    # The first process looks for all: one that looked for itself would miss what a quicker one has written already.
    batches = dist.broadcast(missing() if dist.is_main else None)
    mine = set([*dict.fromkeys(unit for unit, _ in batches)][dist.rank :: dist.world_size])
    batches = [batch for batch in batches if batch[0] in mine]
    of_all = f" (process 1 of {dist.world_size})" if dist.world_size > 1 else ""
    total, done, started = sum(len(items) for _, items in batches), 0, time.monotonic()
    with tqdm(total=total, unit=word, desc=f"encoding{of_all}", disable=not dist.is_main) as progress:
        loaded = zip(batches, read([items for _, items in batches]), strict=True)
        for unit, group in groupby(loaded, key=lambda pair: pair[0][0]):
            encoded = []
            for (_, items), batch in group:
                encoded.append(encode(batch))
                progress.update(len(items))
            done += write(unit, encoded)
    done, seconds = sum(dist.gather(done)), time.monotonic() - started
    if dist.is_main and done:
        log.info(f"encoded {done} {word} in {seconds:.1f} s, {done / seconds:.1f} {word}/s over all processes")
