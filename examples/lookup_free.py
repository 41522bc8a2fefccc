"""Your own quantiser: it has no codebook, the signs of a latent's channels are the bits of its code.

    python3 tokenizer/tokenizer_image/vq_train.py --import examples/lookup_free.py --quantizer lookup-free --codebook-size 1024 \\
        --entropy-loss-ratio 0.1 --data-path images
    python3 autoregressive/train/extract_codes_c2i.py --import examples/lookup_free.py --vq-ckpt results_tokenizer_image \\
        --data-path images --code-path codes

Lookup-free quantisation (MAGVIT-v2, arXiv 2310.05737, section 3.1), shorter than the project's own `--quantizer lfq`. The
tokenizer's file records its quantiser; without --import it is refused.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.base import CodebookLosses, Quantizer, register_quantizer


@register_quantizer("lookup-free")
class LookupFree(Quantizer):
    """Signs as bits, the first channel the lowest. commit_loss_beta and entropy_loss_ratio are vq_train.py's flags."""

    def __init__(self, codebook_size: int = 1024, commit_loss_beta: float = 0.25, entropy_loss_ratio: float = 0.1):
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
        return (codes[:, None] >> self._places(codes.device) & 1).float() * 2 - 1

    def forward(self, latents: Tensor) -> tuple[Tensor, CodebookLosses, Tensor]:
        codes = self.nearest(latents)
        signs = self.lookup(codes)
        losses = {
            "commit": self.commit_loss_beta * F.mse_loss(latents, signs),
            "entropy": self.entropy_loss_ratio * self._entropy(latents),
        }
        return latents + (signs - latents).detach(), CodebookLosses(losses, self.usage(codes)), codes

    def _entropy(self, latents: Tensor) -> Tensor:
        """Return the mean entropy of the bits less the entropy of the mean bit: bits should be sure, and all codes used."""

        def entropy(p: Tensor) -> Tensor:
            return F.binary_cross_entropy(p, p)

        p = torch.sigmoid(4 * latents)
        return entropy(p) - entropy(p.mean(dim=(0, 2, 3)))
