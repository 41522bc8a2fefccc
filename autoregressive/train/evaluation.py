"""Held-out loss: the mean of a loss over a whole data set, shared among the processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoregressive.models.trunk import Trunk
from autoregressive.train.loss import TokenLoss
from utils.distributed import Distributed


def require_readable(dataset: Dataset, dist: Distributed) -> None:
    """Read every item of a held-out set once, each process a share: a damaged one is found before training begins."""
    with dist.together():
        for index in range(dist.rank, len(dataset), dist.world_size):
            dataset[index]


def own_orders(model: Trunk, codes: Tensor) -> Tensor | None:
    """Return an order of a model whose images have orders of their own, for all samples of codes (B, N); None for others.

    It is one for all, so that a mean over samples does not depend on how they are split.
    """
    return model.layout.draw_order(0).to(codes.device).expand_as(codes) if model.layout.own_orders else None


@torch.no_grad()
def mean_loss(model: Trunk, dataset: Dataset, batch_size: int, dist: Distributed) -> float:
    """Return the cross-entropy over a whole data set of {"codes", "label"}, each process reading a share (nats per token)."""
    loss = TokenLoss(model)

    def losses(items: list[dict]) -> tuple[Tensor, int]:
        codes = torch.stack([item["codes"] for item in items]).to(dist.device)
        labels = torch.tensor([item["label"] for item in items], device=dist.device)
        return loss(codes, labels, orders=own_orders(model, codes)), len(items)

    return mean_over(losses, dataset, batch_size, dist)


@torch.no_grad()
def mean_over(
    loss: Callable[[list[Any]], tuple[Tensor, Tensor | int]], dataset: Dataset, batch_size: int, dist: Distributed
) -> float:
    """Return the mean of a loss over a whole data set, each process reading a share; NaN where nothing counts.

    loss: takes a batch's items, returns their mean loss and how many it is the mean of.
    Raises AgreedError on every process where one of them cannot read its share.
    """
    total = torch.zeros(2, dtype=torch.float64)
    share = range(dist.rank, len(dataset), dist.world_size)  # of one process it may be empty
    with dist.together():
        # As many passes on every process: sharded weights are exchanged by the number of passes a process has made.
        for start in range(0, -(-len(dataset) // dist.world_size), batch_size):
            items = [dataset[i] for i in share[start : start + batch_size]]
            value, count = loss(items or [dataset[0]])
            if items:
                total += torch.tensor([float(value) * float(count), float(count)], dtype=torch.float64)
    total = dist.sum(total.to(dist.device) if dist.device.type == "cuda" else total)
    return float(total[0] / total[1])
