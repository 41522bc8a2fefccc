"""Cross-entropy: minus the log-probability of each token (nats)."""

import torch
from torch import Tensor

from autoregressive.train.objectives import objective


@objective("cross_entropy")
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return minus the log-probability of each target."""
    return logits.logsumexp(-1, keepdim=True) - logits.gather(-1, targets)


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, wide: torch.dtype, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the weighted sum of the rows' mean cross-entropy and, if wanted, its gradient by the logits.

    The gradient is derived by hand: one pass over the logits in place, where autograd keeps several copies of them.

    logits: (C, V), overwritten. targets: int64 (C, P). weights: (C, 1), of the rows. wide: dtype of the sums; the gradient
    has the logits' own.
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
