"""The z-loss: cross-entropy that also pulls the log-normaliser of the logits towards 0 (PaLM, arXiv 2204.02311, section 5).

    python3 autoregressive/train/train_c2i.py --import examples/z_loss.py --objective z_loss --code-path codes

Cross-entropy does not change when a constant is added to all logits, so that they may drift until half precision rounds
them coarsely; the second term holds them. The gradient is autograd's, chunk by chunk.
"""

from torch import Tensor

from autoregressive.train.objectives import objective

WEIGHT = 1e-4


@objective("z_loss")
def z_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each target. logits: float32 (rows, codes). targets: int64 (rows, tokens of a row)."""
    log_normaliser = logits.logsumexp(-1, keepdim=True)
    return log_normaliser - logits.gather(-1, targets) + WEIGHT * log_normaliser.square()
