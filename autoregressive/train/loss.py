"""What training minimises and evaluation reports: the cross-entropy of an image's tokens.

    loss = TokenLoss(model)(codes, labels)               # a scalar; loss.backward() as usual

A codebook is large next to a GPT's width: the logits of a batch, their softmax and its gradient in float32 take more
memory than the transformer. Here they never exist as a whole. `linear_cross_entropy` goes through the rows in chunks and
works out a chunk's gradients while it has the chunk's logits, so nothing is kept for the backward pass or computed twice.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import Dataset

from autoregressive.models.gpt import Conditions, Transformer
from autoregressive.models.layouts import Layout
from autoregressive.models.layouts.patches import with_patches
from utils.distributed import Distributed
from utils.errors import AgreedError

# Of a chunk's logits in float32. On CUDA, where they are never in float32, more rows make up for the pass over the weight's
# gradient that each chunk costs.
CHUNK_BYTES, CUDA_CHUNK_BYTES = 64 * 2**20, 256 * 2**20


class TokenLoss(nn.Module):
    """Mean negative log-likelihood of every token given those before its group or patch (nats per token).

    A module around the model, and the one to be parallelized: what shards the weights must see that the forward pass
    uses the output layer's. chunk_rows: rows whose logits exist at a time (by default as many as take 64 MB, on CUDA 256 MB).
    LlamaGen (arXiv 2406.06525, equation 2); with groups: PAR (2412.15119, equation 2); with patches: NPP (2412.15321,
    section 3).
    """

    def __init__(self, model: Transformer, chunk_rows: int | None = None):
        super().__init__()
        self.model = model
        self.chunk_rows = chunk_rows
        self._layouts: dict[tuple[int, torch.device], tuple[Layout, Tensor]] = {}

    def layout(self, patch_side: int, device: torch.device) -> tuple[Layout, Tensor]:
        """The model's layout with patches of that side, and its order on the device."""
        if (patch_side, device) not in self._layouts:
            layout = with_patches(self.model.layout, patch_side)
            with torch.inference_mode(False):  # kept for training too, whoever asks first
                self._layouts[patch_side, device] = layout, layout.order.to(device)
        return self._layouts[patch_side, device]

    def forward(
        self,
        codes: Tensor,
        cond: Conditions,
        *,
        drop: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        valid: Tensor | None = None,
        patch_side: int = 1,
    ) -> Tensor:
        """codes: int64 (B, N) in raster order. cond, drop, prefix_mask: as Transformer.forward takes them.

        valid: (B,), samples marked 0 are left out of the mean. patch_side: side of the patches that are read and predicted.
        Returns a float32 scalar. Raises ValueError where the patches do not fit the model's layout.
        """
        layout, order = self.layout(patch_side, codes.device)
        tokens = codes[:, order]
        inputs = tokens[:, : -layout.step_tokens]
        hidden = self.model.hidden(inputs, cond, layout=layout, drop=drop, prefix_mask=prefix_mask)  # (B, rows, dim)
        targets = tokens.view(-1, layout.patch_tokens)
        row_weights = None if valid is None else valid.float().repeat_interleave(hidden.shape[1])
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.model.output.weight, targets, row_weights, self.chunk_rows
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Mean over rows of the mean cross-entropy of softmax(hidden @ weight.T) with the row's P targets.

    hidden: (R, D). weight: (V, D). targets: int64 (R, P). row_weights: (R,) weights of the mean, all alike where not given;
    their sum counts as at least 1. chunk_rows: rows whose logits exist at a time.
    Products are taken in the autocast dtype where autocast is on, else in that of the tensors; logits and sums are
    float32 (float64 for float64).
    Returns a scalar, float32 (or float64), differentiable once by hidden and weight.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, row_weights, chunk_rows)
    return _in_chunks(hidden, weight, targets, row_weights, chunk_rows)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are found in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor | None,
        chunk_rows: int | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        loss, *gradients = _in_chunks(hidden, weight, targets, row_weights, chunk_rows, *needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_cross_entropy can be differentiated only once: leave out create_graph=True")
        grad_hidden, grad_weight, scale = ctx.saved_tensors
        scale = scale * grad_output
        # float32 until the scale is in: that of a GradScaler is beyond float16
        gradients = [
            None if gradient is None else (gradient.to(scale.dtype) * scale).to(dtype)
            for gradient, dtype in zip((grad_hidden, grad_weight), ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None,
    chunk_rows: int | None,
    hidden_gradient: bool = False,
    weight_gradient: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The loss, and the gradients of its sum over rows: to be multiplied by the last tensor, which makes it a mean.

    Gradients of a sum are of the size of a probability, which half precision holds; those of a mean would vanish in it.
    """
    device, rows = hidden.device.type, len(hidden)
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, weight.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    product_weight = weight.to(dtype)
    if row_weights is None:
        row_weights = torch.ones(rows, dtype=wide, device=hidden.device)
    row_weights = row_weights.to(wide)
    scale = 1 / row_weights.sum().clamp(min=1)
    chunk_bytes = CUDA_CHUNK_BYTES if device == "cuda" else CHUNK_BYTES
    chunk_rows = chunk_rows or max(chunk_bytes // (4 * len(weight)), 1)
    if device == "cuda":
        chunk_rows = even_chunk(rows, chunk_rows)
    chunk_losses = _compiled_chunk_losses() if device == "cuda" else _chunk_losses

    total = scale.new_zeros(())
    grad_hidden = torch.empty_like(hidden, dtype=dtype) if hidden_gradient else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if weight_gradient else None
    with torch.autocast(device, enabled=False):
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            part = hidden[chunk].to(dtype)
            logits = torch.mm(part, product_weight.t())  # (C, V)
            loss, gradient = chunk_losses(
                logits, targets[chunk], row_weights[chunk, None], wide, hidden_gradient or weight_gradient
            )
            total += loss
            if hidden_gradient:
                torch.mm(gradient, product_weight, out=grad_hidden[chunk])
            if weight_gradient:
                add_product(grad_weight, gradient.t(), part)
    return total * scale, grad_hidden, grad_weight, scale


def even_chunk(rows: int, most: int) -> int:
    """Return the length of chunks of at most `most` rows, all of one length where twice as many can be: one graph serves them."""
    least = -(-rows // most)
    return -(-rows // next((count for count in range(least, 2 * least + 1) if rows % count == 0), least))


def _chunk_losses(
    logits: Tensor, targets: Tensor, weights: Tensor, wide: torch.dtype, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The weighted sum of a chunk's losses, and its gradient by the logits, in the logits' dtype.

    logits: (C, V), overwritten. targets: (C, P). weights: (C, 1). A row's loss is its log-normaliser, found once, less
    the mean of the P targets' logits.
    """
    dtype = logits.dtype
    logits = logits.to(wide)
    picked = logits.gather(1, targets)  # (C, P)
    top = logits.amax(1, keepdim=True)
    powers = logits.sub_(top).exp_()
    normaliser = powers.sum(1, keepdim=True)
    picked = picked - (top + normaliser.log())  # log-probabilities
    loss = -(weights * picked.mean(1, keepdim=True)).sum()
    if not want_gradient:
        return loss, None
    gradient = powers.mul_(weights / normaliser).to(dtype)
    # Written, not added, in float32 before it is rounded: a probability near 1 and its target must cancel exactly. Of
    # equal targets each writes the same.
    times = (targets[:, :, None] == targets[:, None, :]).sum(-1)  # (C, P)
    at_targets = weights * (picked.exp() - times / targets.shape[1])
    return loss, gradient.scatter_(1, targets, at_targets.to(dtype))


@cache
def _compiled_chunk_losses() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """For CUDA: one pass over the logits in place of seven. Made when needed, since the compiler takes long to import."""
    return torch.compile(_chunk_losses)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32 (or float64) and the factors may be of half precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    # A product is rounded to the factors' dtype, as that of a whole batch would be. As a mean, a sum over rows cannot
    # overflow float16.
    summed = a.shape[1]
    total.add_(torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=1 / summed), alpha=summed)


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
    """By what each micro-batch's loss is to be multiplied, so that the mean over all of them is that over valid samples.

    counts: int64 (M,), the valid samples of each of this process's micro-batches of a step. Losses are means over a
    micro-batch's valid samples, gradients are averaged over micro-batches and processes: where their numbers of valid
    samples differ, that is not sum(loss * valid) / max(sum(valid), 1) of the global batch. With these factors it is.
    Returns float32 (M,). Every process calls it together.
    """
    total = dist.sum(counts.sum())
    return counts * (dist.world_size * len(counts)) / total.clamp(min=1)


def require_readable(dataset: Dataset, dist: Distributed) -> None:
    """Reads every item of a held-out set once, each process a share: a damaged one is found before training begins.

    Raises AgreedError on every process.
    """
    failure = None
    try:
        for index in range(dist.rank, len(dataset), dist.world_size):
            dataset[index]
    except (ValueError, OSError) as error:
        failure = error
    if failure := dist.first_failure(failure):
        raise AgreedError(failure)


@torch.no_grad()
def mean_loss(model: Transformer, dataset: Dataset, batch_size: int, dist: Distributed) -> float:
    """The loss over a whole data set of (codes, label), each process reading a share (nats per token)."""
    loss = TokenLoss(model)

    def losses(items: list[tuple]) -> tuple[Tensor, int]:
        codes = torch.stack([codes for codes, _ in items]).to(dist.device)
        labels = torch.tensor([label for _, label in items], device=dist.device)
        return loss(codes, labels), len(items)

    return mean_over(losses, dataset, batch_size, dist)


@torch.no_grad()
def mean_over(
    loss: Callable[[list[Any]], tuple[Tensor, Tensor | int]], dataset: Dataset, batch_size: int, dist: Distributed
) -> float:
    """The mean of a loss over a whole data set, each process reading a share.

    loss: takes a batch's items, returns their mean loss and how many it is the mean of. NaN where that is none in all.
    Raises AgreedError on every process where one of them cannot read its share.
    """
    total = torch.zeros(2, dtype=torch.float64)
    share = range(dist.rank, len(dataset), dist.world_size)  # of one process it may be empty
    failure = None
    try:
        # As many passes on every process: sharded weights are exchanged by the number of passes a process has made.
        for start in range(0, -(-len(dataset) // dist.world_size), batch_size):
            items = [dataset[i] for i in share[start : start + batch_size]]
            value, count = loss(items or [dataset[0]])
            if items:
                total += torch.tensor([float(value) * float(count), float(count)], dtype=torch.float64)
    except (ValueError, OSError) as error:
        failure = error
    if failure := dist.first_failure(failure):
        raise AgreedError(failure)
    total = dist.sum(total.to(dist.device) if dist.device.type == "cuda" else total)
    return float(total[0] / total[1])
