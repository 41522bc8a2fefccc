"""The published quantiser whose codes begin at latents of the data, and begin there again when they fall out of use.

Restarts of unused codes: Jukebox (arXiv 2005.00341, section 3.1).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tokenizer.base import CodebookLosses, register_quantizer
from tokenizer.tokenizer_image.quantizers.vq import VectorQuantizer


@register_quantizer("vq_restart")
class RestartQuantizer(VectorQuantizer):
    """A codebook in use: a code that is none of the last 65,536 seen in training moves to a latent of the batch."""

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.0,
        l2_norm: bool = True,
    ):
        super().__init__(codebook_size, codebook_embed_dim, commit_loss_beta, entropy_loss_ratio, l2_norm)

    def forward(self, z: Tensor) -> tuple[Tensor, CodebookLosses | None, Tensor]:
        if self.training:
            self._restart(z.detach())
        return super().forward(z)

    @torch.no_grad()
    def _restart(self, z: Tensor) -> None:
        latents, seen, weight = z.permute(0, 2, 3, 1).reshape(-1, self.width), self.codebook_used, self.embedding.weight
        unused = torch.ones(self.codebook_size, dtype=torch.bool, device=z.device)
        unused[seen] = False
        chosen = torch.randint(len(latents), (self.codebook_size,), device=z.device)
        weight.copy_(torch.where(unused[:, None], self._normalise(latents[chosen]).to(weight.dtype), weight))
        # As if seen now, so that a code has as long again to come into use.
        fresh = unused.nonzero().flatten()[-len(seen) :]
        seen.copy_(torch.cat([seen[len(fresh) :], fresh]))
        if dist.is_initialized():
            for tensor in (weight, seen):
                dist.broadcast(tensor, 0)
