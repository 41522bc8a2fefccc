"""Objectives over the output layer in chunks of rows, so that the logits of a batch never exist at once.

    loss = chunked_loss(hidden, weight, targets, objective=cross_entropy)        # a scalar; loss.backward() as usual
    values = chunked_values(hidden, weight, targets, objective=cross_entropy)    # (R, P), differentiable too

A codebook is large next to a GPT's width: the logits of a batch, their softmax and its gradient in float32 take more
memory than the transformer. `chunked_loss` finds a chunk's gradients while the chunk's logits are there: nothing is kept
for the backward pass or computed twice.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autoregressive.train.objectives import Objective
from autoregressive.train.objectives.cross_entropy import cross_entropy, weighted_cross_entropy

# Of a chunk's logits in float32. On CUDA, where they are never in float32, more rows make up for the pass over the weight's
# gradient that each chunk costs.
CHUNK_BYTES, CUDA_CHUNK_BYTES = 64 * 2**20, 256 * 2**20


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    objective: Objective = cross_entropy,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the mean over rows of the mean over a row's targets of objective(hidden @ weight.T + bias, targets).

    Products are taken in the autocast dtype if autocast is on, else in that of the tensors; logits and sums are float32
    (float64 for float64).

    hidden: (R, D). weight: (V, D). targets: int64 (R, P). bias: (V,), none by default.
    row_weights: (R,) weights of the mean, equal by default; their sum counts as at least 1.
    objective: a function of logits (rows, V) and targets (rows, P), which returns (rows, P).
    chunk_rows: rows whose logits exist at a time.
    Returns a scalar, float32 (or float64), differentiable once by hidden, weight and bias.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        return _ChunkedLoss.apply(hidden, weight, bias, targets, row_weights, objective, chunk_rows)
    return _in_chunks(hidden, weight, bias, targets, row_weights, objective, chunk_rows)[0]


def chunked_values(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    objective: Objective = cross_entropy,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return objective(hidden @ weight.T + bias, targets) for each target, (R, P), differentiable by all but the targets.

    The backward pass computes the logits once more, since it alone knows what each value counts.
    Arguments as for `chunked_loss`.
    """
    dtype, wide = _dtypes(hidden, weight)

    def values_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            own_bias = None if bias is None else bias.to(dtype)
            return objective(F.linear(hidden.to(dtype), weight.to(dtype), own_bias).to(wide), targets)

    parts = zip(*(x.split(chunk_rows or _default_rows(hidden, weight)) for x in (hidden, targets)), strict=True)
    return torch.cat([checkpoint(values_of, part, weight, aims, use_reentrant=False) for part, aims in parts])


class _ChunkedLoss(torch.autograd.Function):
    """The gradients are found in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weights: Tensor | None,
        objective: Objective,
        chunk_rows: int | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        loss, *gradients = _in_chunks(hidden, weight, bias, targets, row_weights, objective, chunk_rows, *needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("chunked_loss can be differentiated only once: leave out create_graph=True")
        *gradients, scale = ctx.saved_tensors
        scale = scale * grad_output
        # float32 until the scale is in: that of a GradScaler is beyond float16
        gradients = [
            None if gradient is None else (gradient.to(scale.dtype) * scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor | None,
    objective: Objective,
    chunk_rows: int | None,
    hidden_gradient: bool = False,
    weight_gradient: bool = False,
    bias_gradient: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Return the loss, the gradients of its sum over rows, and the factor that makes that sum a mean.

    Gradients of a sum are of the size of a probability, which half precision holds; those of a mean would vanish in it.
    """
    cuda, rows = hidden.device.type == "cuda", len(hidden)
    dtype, wide = _dtypes(hidden, weight)
    product_weight, product_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if row_weights is None:
        row_weights = torch.ones(rows, dtype=wide, device=hidden.device)
    row_weights = row_weights.to(wide)
    scale = 1 / row_weights.sum().clamp(min=1)
    chunk_rows = chunk_rows or _default_rows(hidden, weight)
    if cuda:
        chunk_rows = even_chunk(rows, chunk_rows)
    chunk_loss = _chunk_loss(objective, cuda)

    total = scale.new_zeros(())
    grad_hidden = torch.empty_like(hidden, dtype=dtype) if hidden_gradient else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if weight_gradient else None
    grad_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if bias_gradient else None
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            part = hidden[chunk].to(dtype)
            product = part, product_weight.t()
            logits = torch.mm(*product) if product_bias is None else torch.addmm(product_bias, *product)  # (C, V)
            wanted = hidden_gradient or weight_gradient or bias_gradient
            loss, gradient = chunk_loss(logits, targets[chunk], row_weights[chunk, None], wide, wanted)
            total += loss
            if hidden_gradient:
                torch.mm(gradient, product_weight, out=grad_hidden[chunk])
            if weight_gradient:
                add_product(grad_weight, gradient.t(), part)
            if bias_gradient:
                grad_bias += gradient.sum(0, dtype=wide)
    return total * scale, grad_hidden, grad_weight, grad_bias, scale


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of products, and that of logits and sums."""
    device = hidden.device.type
    own = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own
    return dtype, torch.promote_types(dtype, torch.float32)


def _default_rows(hidden: Tensor, weight: Tensor) -> int:
    return max((CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES) // (4 * len(weight)), 1)


def even_chunk(rows: int, most: int) -> int:
    """Return the length of chunks of at most `most` rows, all of one length where twice as many can be: one graph serves them."""
    least = -(-rows // most)
    return -(-rows // next((count for count in range(least, 2 * least + 1) if rows % count == 0), least))


@cache
def _chunk_loss(objective: Objective, compiled: bool) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the function of a chunk's weighted loss and its gradient by the logits, as `weighted_cross_entropy` returns them.

    compiled: for CUDA, one pass over the logits in place of several; the compiler takes long to import.
    """
    if objective is cross_entropy:
        return torch.compile(weighted_cross_entropy) if compiled else weighted_cross_entropy

    def weighted(logits: Tensor, targets: Tensor, weights: Tensor, wide: torch.dtype) -> Tensor:
        return (weights * objective(logits.to(wide), targets).mean(1, keepdim=True)).sum()

    loss_of = torch.compile(weighted) if compiled else weighted

    def by_autograd(
        logits: Tensor, targets: Tensor, weights: Tensor, wide: torch.dtype, want_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(want_gradient):
            loss = loss_of(logits.requires_grad_(want_gradient), targets, weights, wide)
        return loss.detach(), torch.autograd.grad(loss, logits)[0] if want_gradient else None

    return by_autograd


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total, where total is float32 (or float64) and the factors may be of half precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    # A product is rounded to the factors' dtype, as that of a whole batch would be. As a mean, a sum over rows cannot
    # overflow float16.
    summed = a.shape[1]
    total.add_(torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=1 / summed), alpha=summed)
