"""The loss of an image's tokens.

    loss = TokenLoss(model)(codes, labels)                           # a scalar; loss.backward() as usual
    log_probs = token_log_probs(model, codes, labels)                # (B, N), for objectives over whole samples

What is computed of a token's logits is an objective (`objectives/`); cross-entropy unless another is given.
"""

import torch
import torch.nn as nn
from torch import Tensor

from autoregressive.models.layouts import Layout
from autoregressive.models.trunk import Conditions, Trunk
from autoregressive.train.objectives import Objective
from autoregressive.train.objectives.chunked import chunked_loss, chunked_values
from autoregressive.train.objectives.cross_entropy import cross_entropy
from utils.distributed import Distributed


class TokenLoss(nn.Module):
    """Mean objective of every token given those before its group or patch; cross-entropy in nats per token.

    A module around the model, and the one to be parallelized: what shards the weights must see that the forward pass
    uses the output layer's. chunk_rows: rows whose logits exist at a time (by default as many as take 64 MB, on CUDA 256 MB).
    LlamaGen (arXiv 2406.06525, equation 2); with groups: PAR (2412.15119, equation 2); with patches: NPP (2412.15321,
    section 3).
    """

    def __init__(self, model: Trunk, objective: Objective = cross_entropy, chunk_rows: int | None = None):
        super().__init__()
        self.model, self.objective, self.chunk_rows = model, objective, chunk_rows

    def forward(
        self,
        codes: Tensor,
        cond: Conditions,
        *,
        drop: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        valid: Tensor | None = None,
        layout: Layout | None = None,
        orders: Tensor | None = None,
    ) -> Tensor:
        """Return the mean over all tokens, a float32 scalar.

        codes: int64 (B, N) in raster order; fewer for pictures of other sides, where the model is of several resolutions.
        cond, layout, orders, drop, prefix_mask: as Trunk.forward takes them.
        valid: (B,), samples marked 0 are left out of the mean.
        Raises ValueError for codes of another image size.
        """
        args, number = self.model.args, codes.shape[1]
        if number > args.block_size or (number < args.block_size and not args.rope_grid):
            raise ValueError(f"{number} codes an image, the model has {args.block_size}: give codes of its image size")
        layout = layout or self.model.layout
        order = self.model.layout_order(layout, codes.device)[:number]
        tokens = codes[:, order] if orders is None else codes.gather(1, orders)
        hidden, targets = _predictions(self.model, layout, tokens, cond, drop, prefix_mask, orders)
        row_weights = None if valid is None else valid.float().repeat_interleave(len(hidden) // len(codes))
        weight, bias = self.model.projection()
        return chunked_loss(
            hidden, weight, targets, row_weights, bias=bias, objective=self.objective, chunk_rows=self.chunk_rows
        )


def token_log_probs(
    model: Trunk,
    codes: Tensor,
    cond: Conditions,
    *,
    drop: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    layout: Layout | None = None,
    orders: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the log-probability of every token given those before its group, float32 (B, N) in raster order.

    Differentiable, and without all logits at once; the backward pass computes them again. Arguments as for `TokenLoss`.
    """
    layout = layout or model.layout
    order = model.layout_order(layout, codes.device).expand_as(codes) if orders is None else orders
    hidden, targets = _predictions(model, layout, codes.gather(1, order), cond, drop, prefix_mask, orders)
    weight, bias = model.projection()
    values = -chunked_values(hidden, weight, targets, bias=bias, chunk_rows=chunk_rows).view(codes.shape)
    return values.gather(1, order.argsort(1))


def _predictions(
    model: Trunk,
    layout: Layout,
    tokens: Tensor,
    cond: Conditions,
    drop: Tensor | None,
    prefix_mask: Tensor | None,
    orders: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the model's outputs before the output layer, (R, D), and the tokens that each predicts, (R, P).

    tokens: int64 (B, N) in the layout's order. Rows go by samples, then by the order.
    """
    read = tokens[:, : -layout.step_tokens]
    hidden = model.hidden(read, cond, layout=layout, orders=orders, drop=drop, prefix_mask=prefix_mask)
    return hidden.flatten(0, 1), tokens.view(-1, layout.patch_tokens)


def dropped_conditions(
    seed: int, global_batch: int, positions: slice, probability: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw which samples of a step lose their condition, bool (positions,): the same however the batch is split."""
    generator = torch.Generator().manual_seed(seed)
    drop = torch.rand(global_batch, generator=generator)[positions] < probability
    if torch.device(device).type == "cuda":  # from pinned memory, which no copy waits for
        return drop.pin_memory().to(device, non_blocking=True)
    return drop.to(device)


def share_of_valid(counts: Tensor, dist: Distributed) -> Tensor:
    """Return the factor of each micro-batch's loss that makes the mean over micro-batches the mean over valid samples.

    counts: int64 (M,), the valid samples of each of this process's micro-batches of a step. Losses are means over a
    micro-batch's valid samples, gradients are averaged over micro-batches and processes: where their numbers of valid
    samples differ, that is not sum(loss * valid) / max(sum(valid), 1) of the global batch. With these factors it is.
    Returns float32 (M,). Every process calls it together.
    """
    total = dist.sum(counts.sum())
    return counts * (dist.world_size * len(counts)) / total.clamp(min=1)
