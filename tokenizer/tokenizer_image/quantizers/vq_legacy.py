"""The nearest row of a codebook as taming and MaskGIT trained it: no norms, and the weight beta on the codebook's loss.

VQGAN's code (arXiv 2012.09841) calls this order of its losses legacy; MaskGIT (2202.04200) has it too.
"""

from tokenizer.base import register_quantizer
from tokenizer.tokenizer_image.quantizers.vq import VectorQuantizer


@register_quantizer("vq_legacy")
class LegacyQuantizer(VectorQuantizer):
    """A codebook without l2-norm; commit_loss_beta scales the loss that moves its rows, not the one that moves latents."""

    def __init__(
        self,
        codebook_size: int = 1024,
        codebook_embed_dim: int = 256,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.0,
    ):
        super().__init__(
            codebook_size, codebook_embed_dim, commit_loss_beta, entropy_loss_ratio, l2_norm=False, show_usage=False
        )
        self.vq_weight, self.commit_weight = commit_loss_beta, 1.0
