"""What training minimises and evaluation reports: the cross-entropy of an image's tokens.

loss = next_token_loss(model, codes, labels)             # a scalar
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from autoregressive.models.gpt import Transformer
from autoregressive.models.layout import TokenLayout
from utils.distributed import Distributed


def next_token_loss(
    model: nn.Module,
    layout: TokenLayout,
    codes: Tensor,
    cond: Tensor,
    *,
    drop: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood of every token given those before its group (nats per token).

    model: a Transformer, wrapped or not. codes: int64 (B, N) in raster order. cond, drop, prefix_mask: as
    Transformer.forward takes them. valid: (B,), samples marked 0 are left out of the mean.
    LlamaGen (arXiv 2406.06525, equation 2); with groups: PAR (2412.15119, equation 2).
    """
    tokens = codes[:, layout.order.to(codes.device)]
    logits = model(tokens[:, : -layout.group_size], cond, drop=drop, prefix_mask=prefix_mask)  # (B, N, V)
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    if valid is None:
        return losses.mean()
    weights = valid.to(losses.dtype)[:, None].expand_as(losses)
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def dropped_conditions(seed: int, global_batch: int, positions: slice, probability: float) -> Tensor:
    """Which samples of a step lose their condition, bool (positions,): the same however the batch is split."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(global_batch, generator=generator)[positions] < probability


@torch.no_grad()
def mean_loss(model: Transformer, dataset: Dataset, batch_size: int, dist: Distributed) -> float:
    """The loss over a whole data set of (codes, label), each process reading a share (nats per token)."""
    total = torch.zeros(2, dtype=torch.float64)
    share = range(dist.rank, len(dataset), dist.world_size)  # of one process it may be empty
    for start in range(0, len(share), batch_size):
        items = [dataset[i] for i in share[start : start + batch_size]]
        codes = torch.stack([codes for codes, _ in items]).to(dist.device)
        labels = torch.tensor([label for _, label in items], device=dist.device)
        value = next_token_loss(model, model.layout, codes, labels)
        total += torch.tensor([float(value) * len(items), len(items)], dtype=torch.float64)
    total = dist.sum(total.to(dist.device) if dist.device.type == "cuda" else total)
    return float(total[0] / total[1])
