"""Lookup-free codes: no codebook, the signs of a latent's channels are the bits of its code.

    quantised, losses, codes = LookupFreeQuantizer(2**18)(latents)

MAGVIT-v2 (arXiv 2310.05737, section 3.1), with the losses of Open-MAGVIT2 (arXiv 2409.04410, section 3.1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.base import CodebookLosses, Quantizer, register_quantizer
from tokenizer.tokenizer_image.quantizers.vq import ENTROPY_TEMPERATURE


def entropy_loss(latents: Tensor) -> Tensor:
    """Return the mean entropy of latents' assignments less the entropy of the mean assignment: (N, bits) -> a scalar.

    An assignment is the softmax over all 2^bits codes of 2 (latent · code) / 0.01, codes being ±1. It is the product of
    those of two halves of the bits, so that its entropy is their sum, and the mean assignment one matrix product of
    (2^(bits/2), N) with (N, 2^(bits/2)): no table of N x 2^bits.
    """
    halves = latents.tensor_split(2, dim=1)
    logs = [F.log_softmax(half @ _signs(half.shape[1], half) * (2 / ENTROPY_TEMPERATURE), dim=1) for half in halves]
    low, high = (log.exp() for log in logs)
    sample = -sum((log.exp() * log).sum(dim=1).mean() for log in logs)
    mean = low.T @ high / len(latents)  # (2^(bits/2), 2^(bits/2))
    return sample + (mean * (mean + 1e-5).log()).sum()


def _signs(bits: int, like: Tensor) -> Tensor:
    """Return all codes of so many bits as columns of ±1, (bits, 2^bits)."""
    codes = torch.arange(2**bits, device=like.device)
    return (codes >> torch.arange(bits, device=like.device)[:, None] & 1).to(like.dtype) * 2 - 1


@register_quantizer("lfq")
class LookupFreeQuantizer(Quantizer):
    """The signs of the channels as bits, the first channel the lowest; 0 counts as minus.

    Raises ValueError where the number of codes is no power of two.
    """

    def __init__(self, codebook_size: int = 2**18, commit_loss_beta: float = 0.25, entropy_loss_ratio: float = 0.1):
        super().__init__()
        self.codebook_size, self.width = codebook_size, codebook_size.bit_length() - 1
        if codebook_size < 2 or codebook_size != 2**self.width:
            raise ValueError(f"lookup-free codes are bits: --codebook-size {codebook_size} is no power of two")
        self.commit_loss_beta, self.entropy_loss_ratio = commit_loss_beta, entropy_loss_ratio

    def _places(self, device: torch.device) -> Tensor:
        return torch.arange(self.width, device=device)[:, None, None]

    def nearest(self, latents: Tensor) -> Tensor:
        return ((latents > 0).long() << self._places(latents.device)).sum(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        return (codes.long()[:, None] >> self._places(codes.device) & 1).float() * 2 - 1

    def forward(self, latents: Tensor) -> tuple[Tensor, CodebookLosses, Tensor]:
        """Quantise with a straight-through gradient. Losses: commit, entropy (see `entropy_loss`)."""
        codes = self.nearest(latents)
        signs = self.lookup(codes)
        entropy = latents.new_zeros(())
        if self.training and self.entropy_loss_ratio:
            entropy = self.entropy_loss_ratio * entropy_loss(latents.movedim(1, -1).flatten(0, -2))
        commit = self.commit_loss_beta * F.mse_loss(latents, signs)
        losses = CodebookLosses({"commit": commit, "entropy": entropy}, self.usage(codes))
        return latents + (signs - latents).detach(), losses, codes
