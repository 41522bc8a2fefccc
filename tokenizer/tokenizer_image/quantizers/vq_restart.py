"""The published quantiser whose codes begin at latents of the data, and begin there again when they fall out of use.

Restarts of unused codes: Jukebox (arXiv 2005.00341, section 3.1).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tokenizer.base import CodebookLosses, register_quantizer
from tokenizer.tokenizer_image.quantizers.vq import VectorQuantizer

PATIENCE = 100  # steps


@register_quantizer("vq_restart")
class RestartQuantizer(VectorQuantizer):
    """A codebook in use: a code that none of the last 100 batches had moves to a latent of the batch.

    Latents far from every code are chosen more often. `steps_unused` counts the batches since a code was seen.
    """

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.0,
        l2_norm: bool = True,
    ):
        super().__init__(codebook_size, codebook_embed_dim, commit_loss_beta, entropy_loss_ratio, l2_norm)
        self.register_buffer("steps_unused", torch.full((codebook_size,), PATIENCE))

    def forward(self, z: Tensor) -> tuple[Tensor, CodebookLosses | None, Tensor]:
        if self.training:
            self._restart(z.detach())
        quantised, losses, codes = super().forward(z)
        if self.training:
            self.steps_unused.add_(1).scatter_(0, codes.flatten(), 0)
            if dist.is_initialized():
                dist.all_reduce(self.steps_unused, dist.ReduceOp.MIN)
        return quantised, losses, codes

    @torch.no_grad()
    def _restart(self, z: Tensor) -> None:
        latents, weight = self._normalise(z.permute(0, 2, 3, 1).reshape(-1, self.width)), self.embedding.weight
        codebook, unused = self._normalise(weight), self.steps_unused >= PATIENCE
        distance = (latents - codebook[self._search(latents)]).square().sum(-1)
        distance = distance.nan_to_num() + 1e-6  # a run that has diverged is told by its loss
        chosen = torch.multinomial(distance, self.codebook_size, replacement=True)
        weight.copy_(torch.where(unused[:, None], latents[chosen].to(weight.dtype), weight))
        self.steps_unused.masked_fill_(unused, 0)
        if dist.is_initialized():
            dist.broadcast(weight, 0)
