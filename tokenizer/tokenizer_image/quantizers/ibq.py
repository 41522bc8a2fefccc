"""Index backpropagation: the code is the row with the largest dot product, and all rows get a gradient through a softmax.

IBQ (arXiv 2412.02692, sections 3.2 and 3.3), as the published code computes it: no norms, no bias, no temperature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.base import CodebookLosses, Quantizer, register_quantizer
from tokenizer.tokenizer_image.quantizers.vq import SEARCH_ENTRIES, entropy_loss


@register_quantizer("ibq")
class IndexBackpropagation(Quantizer):
    """A codebook whose row with the largest dot product takes a latent's place.

    In training the decoder's gradient reaches the latents and every row through the softmax of the dot products, and the
    chosen row directly. There is no straight-through gradient.
    """

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 256,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.05,
    ):
        super().__init__()
        self.codebook_size, self.width = codebook_size, codebook_embed_dim
        self.commit_loss_beta, self.entropy_loss_ratio = commit_loss_beta, entropy_loss_ratio
        self.embedding = nn.Embedding(codebook_size, codebook_embed_dim)  # rows begin at N(0, 1)

    def nearest(self, latents: Tensor) -> Tensor:
        rows, shape = self._rows(latents)
        blocks = rows.split(max(1, SEARCH_ENTRIES // self.codebook_size))
        return torch.cat([self._scores(block).argmax(dim=-1) for block in blocks]).view(shape[:3])

    def lookup(self, codes: Tensor) -> Tensor:
        return self.embedding(codes).permute(0, 3, 1, 2).contiguous()

    def forward(self, latents: Tensor) -> tuple[Tensor, CodebookLosses | None, Tensor]:
        """Quantise latents (B, C, h, w). Losses are float32 scalars, None in eval mode.

        quant: the double quantisation loss, which moves rows and latents, with the weight beta on the last part.
        entropy: see `entropy_loss`.
        """
        if not self.training:
            codes = self.nearest(latents)
            return self.lookup(codes), None, codes
        z, shape = self._rows(latents)
        scores = self._scores(z)  # (N, codebook_size)
        codes = scores.argmax(dim=-1)
        chosen = self.embedding(codes)
        mixed = scores.softmax(dim=-1) @ self.embedding.weight.detach()
        quantised = chosen + (mixed - mixed.detach())  # value of the chosen row, gradient through all scores besides
        losses = {
            "quant": F.mse_loss(quantised, z)
            + F.mse_loss(z, chosen.detach())
            + self.commit_loss_beta * F.mse_loss(chosen, z.detach()),
            "entropy": z.new_zeros(()),
        }
        if self.entropy_loss_ratio:
            losses["entropy"] = self.entropy_loss_ratio * entropy_loss(scores)
        quantised = quantised.view(shape).permute(0, 3, 1, 2).contiguous()
        return quantised, CodebookLosses(losses, self.usage(codes)), codes.view(shape[:3])

    def _rows(self, latents: Tensor) -> tuple[Tensor, torch.Size]:
        """Return latents as rows (N, C), and their shape (B, h, w, C)."""
        last = latents.permute(0, 2, 3, 1)
        return last.reshape(-1, self.width), last.shape

    def _scores(self, rows: Tensor) -> Tensor:
        return rows @ self.embedding.weight.to(rows.dtype).T
