"""The published quantiser: the nearest vector of a codebook, with a straight-through gradient.

    quantised, losses, codes = VectorQuantizer(16384, 8)(latents)

VQ-VAE (arXiv 1711.00937) with the l2-normalised low-dimensional codebook of LlamaGen (arXiv 2406.06525, section 3.1).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.base import USAGE_WINDOW, CodebookLosses, Quantizer, register_quantizer

ENTROPY_TEMPERATURE = 0.01
# Entries of the (latents x codebook) table that a search holds at once: 256 MB in float32.
SEARCH_ENTRIES = 2**26


def entropy_loss(affinity: Tensor, temperature: float = ENTROPY_TEMPERATURE) -> Tensor:
    """Return the mean entropy of each latent's assignment minus the entropy of the mean assignment.

    Low when every latent is sure of its code and all codes are used equally. `affinity` (N, codebook_size) is minus the
    squared distance; an offset per row does not matter.
    """
    log_p = F.log_softmax(affinity / temperature, dim=-1)
    p = log_p.exp()
    mean_p = p.mean(dim=0)
    sample_entropy = -(p * log_p).sum(dim=-1).mean()
    return sample_entropy + (mean_p * (mean_p + 1e-5).log()).sum()


@register_quantizer("vq")
class VectorQuantizer(Quantizer):
    """A codebook whose row next to a latent takes its place.

    With `l2_norm`, latents and rows are both l2-normalised before the search and the lookup. `show_usage` keeps the
    last 65536 codes seen in training in the buffer `codebook_used`; usage is the share of codes that occur in it
    (without the buffer: in the batch).
    """

    def __init__(
        self,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.0,
        l2_norm: bool = True,
        show_usage: bool = True,
    ):
        super().__init__()
        self.codebook_size = codebook_size
        self.width = codebook_embed_dim
        self.vq_weight, self.commit_weight = 1.0, commit_loss_beta
        self.entropy_loss_ratio = entropy_loss_ratio
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(codebook_size, codebook_embed_dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
            if l2_norm:
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW, dtype=torch.int64))

    def code_rule(self) -> str:
        return f"codebook_l2_norm={self.l2_norm}"  # the words of the first edition's fingerprints

    def _normalise(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=-1) if self.l2_norm else vectors.float()

    def _distances(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """Return |e|² - 2 z·e, the squared distance less |z|²: (N, C), (codebook_size, C) -> (N, codebook_size)."""
        # |z|² is the same along a row: it moves neither the argmin nor a softmax over the row, nor their gradients.
        return torch.addmm(codebook.square().sum(dim=-1), latents, codebook.T, alpha=-2)

    @torch.no_grad()
    def _search(self, latents: Tensor) -> Tensor:
        """Find the nearest row of the codebook, a block of latents at a time: normalised (N, C) -> int64 (N,)."""
        codebook = self._normalise(self.embedding.weight)
        rows = max(1, SEARCH_ENTRIES // self.codebook_size)
        return torch.cat([self._distances(block, codebook).argmin(dim=-1) for block in latents.split(rows)])

    def nearest(self, latents: Tensor) -> Tensor:
        latents = self._normalise(latents.permute(0, 2, 3, 1).contiguous())  # (B, h, w, C)
        return self._search(latents.flatten(0, 2)).view(latents.shape[:3])

    def lookup(self, codes: Tensor) -> Tensor:
        return self.get_codebook_entry(codes).permute(0, 3, 1, 2).contiguous()

    def forward(self, z: Tensor) -> tuple[Tensor, CodebookLosses | None, Tensor]:
        """Quantise latents (B, C, h, w). Losses are float32 scalars, None in eval mode.

        vq: moves the codebook. commit: moves the latents. entropy: see `entropy_loss`.
        """
        latents = self._normalise(z.permute(0, 2, 3, 1).contiguous())  # (B, h, w, C)
        flat = latents.view(-1, self.width)  # (B*h*w, C)
        entropy = flat.new_zeros(())
        if self.training and self.entropy_loss_ratio != 0:
            distances = self._distances(flat, self._normalise(self.embedding.weight))
            codes = distances.detach().argmin(dim=-1)
            entropy = self.entropy_loss_ratio * entropy_loss(-distances)
        else:
            codes = self._search(flat)
        quant = self._normalise(self.embedding(codes)).view_as(latents)
        losses = None
        if self.training:
            vq = self.vq_weight * F.mse_loss(quant, latents.detach())
            commit = self.commit_weight * F.mse_loss(latents, quant.detach())
            losses = CodebookLosses({"vq": vq, "commit": commit, "entropy": entropy}, self.usage(codes))
        quant = latents + (quant - latents).detach()  # straight-through gradient
        # Left in channels-last strides, as in the recorded runs: their CPU decoder rounds accordingly.
        return quant.permute(0, 3, 1, 2), losses, codes.view(latents.shape[:3])

    def get_codebook_entry(
        self, indices: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> Tensor:
        """Look codes up, as code written for LlamaGen does.

        indices: any shape of integers. Without `shape` the result has the shape of indices plus (C,); otherwise
        `shape` is (B, C, h, w), or (B, h, w, C) where not `channel_first`, and so is the result.
        Raises ValueError if the number of indices or C does not fit `shape`.
        """
        entries = self._normalise(self.embedding(indices)).to(self.embedding.weight.dtype)
        if shape is None:
            return entries
        batch, channels, height, width = shape if channel_first else (shape[0], shape[3], shape[1], shape[2])
        if indices.numel() != batch * height * width or channels != self.width:
            raise ValueError(
                f"{indices.numel()} codes of a codebook with {self.width} channels do not fill a latent "
                f"of shape {tuple(shape)}; give {'(B, C, H, W)' if channel_first else '(B, H, W, C)'} with "
                f"B*H*W = {indices.numel()} and C = {self.width}"
            )
        entries = entries.view(batch, height, width, channels)
        return entries.permute(0, 3, 1, 2).contiguous() if channel_first else entries
