"""Order of samples: each batch is a function of (seed, epoch, batch number), whatever the number of processes.

A run that stopped resumes at the very next batch, on any number of processes, with the samples it would have seen.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.cli import given, settle
from utils.rng import item_seed


def fit_batch(args: Namespace, size: int, world_size: int, resumed: dict[str, Any] | None = None) -> list[str]:
    """Set --global-batch-size, where it is not given, to that of the resumed run or to one that the data set fills.

    size: samples of the data set. resumed: the flags that the run to resume began with. Returns lines for the log.
    """
    asked, default = given(args.global_batch_size), int(args.global_batch_size)
    parts = world_size * args.gradient_accumulation_steps
    before, fits = (resumed or {}).get("global_batch_size"), min(default, size // parts * parts) or default
    settle(args, global_batch_size=before or fits)
    if asked or before or fits == default:
        return []
    return [f"batches of {args.global_batch_size} samples: there are {size}, and --global-batch-size is not given"]


class BatchOrder(Sampler[list[int]]):
    """Yields this process's share of every global batch, in micro-batches. Samples that fill no whole batch wait for
    another epoch's order.

    Raises ValueError where the batch cannot be split, or is larger than the data set.
    """

    def __init__(self, size: int, global_batch: int, micro_batches: int, rank: int, world_size: int, seed: int):
        parts = world_size * micro_batches
        if global_batch % parts:
            raise ValueError(
                f"--global-batch-size {global_batch} cannot be split over {world_size} processes with "
                f"--gradient-accumulation-steps {micro_batches}; {parts} must divide it"
            )
        if size < global_batch:
            raise ValueError(f"the data set has {size} samples, fewer than --global-batch-size {global_batch}")
        self.size, self.global_batch, self.micro_batches = size, global_batch, micro_batches
        self.rank, self.share, self.seed = rank, global_batch // world_size, seed
        self.epoch = self.batch = 0

    @property
    def batches_per_epoch(self) -> int:
        """Global batches, and so optimizer steps, in an epoch."""
        return self.size // self.global_batch

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Set where the next iteration begins."""
        self.epoch, self.batch = epoch, batch

    def positions(self, micro_batch: int) -> slice:
        """Return the positions in the global batch of this process's micro-batch of that number."""
        start = self.rank * self.share + micro_batch * (self.share // self.micro_batches)
        return slice(start, start + self.share // self.micro_batches)

    def samples(self, epoch: int, batch: int, rank: int | None = None, part: int | None = None) -> list[int]:
        """Return the samples of a batch, of a process's share, or of one part of that, to name them to a user."""
        order = self._order(epoch)[batch * self.global_batch : (batch + 1) * self.global_batch]
        if rank is not None:
            order = order[rank * self.share : (rank + 1) * self.share]
        if part is not None:
            size = self.share // self.micro_batches
            order = order[part * size : (part + 1) * size]
        return order.tolist()

    def _order(self, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(item_seed(self.seed, epoch))
        return torch.randperm(self.size, generator=generator).numpy().astype(np.int64)

    def __len__(self) -> int:
        return (self.batches_per_epoch - self.batch) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.epoch)
        for batch in range(self.batch, self.batches_per_epoch):
            indices = order[batch * self.global_batch : (batch + 1) * self.global_batch]
            for micro_batch in range(self.micro_batches):
                yield indices[self.positions(micro_batch)].tolist()
