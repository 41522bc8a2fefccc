"""Schedules of what a step of training reads by: a layout, and for each sample an order of its tokens.

A schedule is asked once a micro-batch. Its draws are functions of the seed, the step and a sample's position in the global
batch: the same for every number of processes, and after a run was resumed.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.layouts import Layout
from autoregressive.models.layouts.group_sizes import training_sizes
from utils.rng import item_seed

# What item_seed hashes besides: the two draws of a sample are unrelated to each other and to other draws of the step.
_WHETHER, _WHICH, _GROUPS = 3, 4, 5


OrderSchedule = Callable[[int, int, slice, int], tuple[Layout, Tensor | None]]
"""Takes a step, its epoch, positions in the global batch and that batch's size: returns the layout of the step, and the orders
of these samples, int64 (positions, N), raster indices at each sequence position; None where all samples have the layout's."""


@dataclass(frozen=True)
class AnnealedOrders:
    """Random orders that give way to the layout's: RAR's recipe (arXiv 2411.00776, section 3.2).

    A sample of a step has a uniformly random order with a probability of 1 before the step `start`, which falls evenly to 0
    at the step `end`, and else the layout's.
    """

    layout: Layout
    seed: int
    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(
                f"random orders end where they begin to be fewer or later, got {self.start:g} {self.end:g}"
            )
        rows = [reader.row for readers in self.layout.readers for reader in readers]
        if self.layout.patch_side > 1 or len({*rows}) < len(rows):
            raise ValueError(
                f"a row of the layout {self.layout.name!r} predicts several tokens: it has no random orders"
            )

    def random_ratio(self, step: int) -> float:
        """Return the probability of a random order at an optimizer step, from 0."""
        if step < self.start:
            return 1.0
        return 0.0 if step >= self.end else 1 - (step - self.start) / (self.end - self.start)

    def __call__(self, step: int, epoch: int, positions: slice, global_batch: int) -> tuple[Layout, Tensor | None]:
        ratio = self.random_ratio(step)
        samples = np.arange(*positions.indices(global_batch), dtype=np.uint64)
        drawn = item_seed(self.seed, step, samples, _WHETHER).astype(np.float64) / 2.0**63 < ratio
        if ratio == 0 or not drawn.any():
            return self.layout, None
        orders = self.layout.order.repeat(len(samples), 1)
        orders[torch.from_numpy(drawn)] = random_orders(self.seed, step, samples[drawn], self.layout.tokens)
        return self.layout, orders


@dataclass(frozen=True)
class RandomGroups:
    """A random order for each sample, and one list of group sizes for each step: LPD's recipe (arXiv 2507.01957, section 4.1)."""

    layout: Layout
    seed: int

    @cached_property
    def layouts(self) -> list[Layout]:
        """Return the layouts that steps choose from, each as likely."""
        return [self.layout.with_groups(sizes) for sizes in training_sizes(self.layout.tokens)]

    def __call__(self, step: int, epoch: int, positions: slice, global_batch: int) -> tuple[Layout, Tensor]:
        layout = self.layouts[item_seed(self.seed, step, _GROUPS) % len(self.layouts)]
        samples = np.arange(*positions.indices(global_batch), dtype=np.uint64)
        return layout, random_orders(self.seed, step, samples, layout.tokens)


def training_orders(args: Namespace, layout: Layout, samples: int) -> OrderSchedule:
    """Return what the flags ask for: --random-orders, or the layout in every step, of LPD with random orders and groups.

    samples: of the data set.

    Raises ValueError for orders that a layout cannot have.
    """
    if layout.own_orders:
        if args.random_orders:
            raise ValueError(
                f"the layout {layout.name!r} has a random order for each sample anyway: leave out --random-orders"
            )
        return RandomGroups(layout, args.global_seed)
    if not any(args.random_orders or ()):
        return lambda *place: (layout, None)
    steps = max(samples // args.global_batch_size, 1)
    start, end = (epoch * steps for epoch in args.random_orders)
    return AnnealedOrders(layout, args.global_seed, start, end)


def random_orders(seed: int, step: int, samples: np.ndarray, tokens: int) -> Tensor:
    """Draw a uniformly random order for samples of a step's global batch, int64 (samples, tokens)."""
    places = np.arange(tokens, dtype=np.uint64)
    keys = item_seed(seed, step, samples.astype(np.uint64)[:, None], places, _WHICH)
    return torch.from_numpy(keys.argsort(axis=1, kind="stable"))
