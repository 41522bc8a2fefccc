"""The codebook: nearest neighbour, straight-through gradient and the losses that train it.

quant, (vq, commit, entropy, usage), (_, _, indices) = VectorQuantizer(16384, 8)(latents)

VQ-VAE (arXiv 1711.00937) with the l2-normalised low-dimensional codebook of LlamaGen (arXiv 2406.06525, section 3.1).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

USAGE_WINDOW = 65536
ENTROPY_TEMPERATURE = 0.01
# Entries of the (latents x codebook) table that a search holds at once: 256 MB in float32.
SEARCH_ENTRIES = 2**26

CodebookLosses = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def entropy_loss(affinity: Tensor, temperature: float = ENTROPY_TEMPERATURE) -> Tensor:
    """Mean entropy of each latent's assignment minus the entropy of the mean assignment.

    Low when every latent is sure of its code and all codes are used equally. `affinity` (N, codebook_size) is minus the
    squared distance; an offset per row does not matter.
    """
    log_p = F.log_softmax(affinity / temperature, dim=-1)
    p = log_p.exp()
    mean_p = p.mean(dim=0)
    sample_entropy = -(p * log_p).sum(dim=-1).mean()
    return sample_entropy + (mean_p * (mean_p + 1e-5).log()).sum()


class VectorQuantizer(nn.Module):
    """Replaces each latent vector by the nearest row of a codebook.

    With `l2_norm`, latents and rows are both l2-normalised before the search and the lookup. `show_usage` keeps the
    last 65536 indices seen in training in the buffer `codebook_used`; usage is the share of codes that occur in it
    (without the buffer: in the batch).
    The search and the losses are float32 under any autocast.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_embed_dim: int,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.0,
        l2_norm: bool = True,
        show_usage: bool = True,
    ):
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_embed_dim = codebook_embed_dim
        self.commit_loss_beta = commit_loss_beta
        self.entropy_loss_ratio = entropy_loss_ratio
        self.l2_norm = l2_norm
        self.show_usage = show_usage

        self.embedding = nn.Embedding(codebook_size, codebook_embed_dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
            if l2_norm:
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW, dtype=torch.int64))

    def _normalise(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=-1) if self.l2_norm else vectors.float()

    def _distances(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """(N, C), (codebook_size, C) -> (N, codebook_size): |e|² - 2 z·e, the squared distance less |z|²."""
        # |z|² is the same along a row: it moves neither the argmin nor a softmax over the row, nor their gradients.
        return torch.addmm(codebook.square().sum(dim=-1), latents, codebook.T, alpha=-2)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest codebook row for each latent: (N, C) -> (N,) int64.

        Computed in float32 whatever the autocast, a block of latents at a time.
        """
        with torch.autocast(latents.device.type, enabled=False):
            latents, codebook = self._normalise(latents), self._normalise(self.embedding.weight)
            rows = max(1, SEARCH_ENTRIES // self.codebook_size)
            return torch.cat([self._distances(block, codebook).argmin(dim=-1) for block in latents.split(rows)])

    def forward(self, z: Tensor) -> tuple[Tensor, CodebookLosses, tuple[None, None, Tensor]]:
        """Quantizes latents.

        z: (B, C, H, W) -> quant (B, C, H, W) in the dtype of z, (vq, commit, entropy, usage), (None, None, indices)
        with indices (B*H*W,) int64 in raster order. The losses are float32 scalars, commit and entropy already scaled
        by `commit_loss_beta` and `entropy_loss_ratio`; in eval mode all four are None.
        The two None stand where VQGAN returns the perplexity and the one-hot encodings.
        """
        with torch.autocast(z.device.type, enabled=False):
            latents = self._normalise(z.permute(0, 2, 3, 1).contiguous())  # (B, H, W, C)
            flat = latents.view(-1, self.codebook_embed_dim)  # (B*H*W, C)

            entropy = flat.new_zeros(())
            if self.training and self.entropy_loss_ratio != 0:
                distances = self._distances(flat, self._normalise(self.embedding.weight))
                indices = distances.detach().argmin(dim=-1)
                entropy = self.entropy_loss_ratio * entropy_loss(-distances)
            else:
                indices = self.nearest(flat)
            quant = self._normalise(self.embedding(indices)).view_as(latents)

            losses: CodebookLosses = (None, None, None, None)
            if self.training:
                vq = F.mse_loss(quant, latents.detach())
                commit = self.commit_loss_beta * F.mse_loss(latents, quant.detach())
                losses = (vq, commit, entropy, self._update_usage(indices))

            quant = latents + (quant - latents).detach()  # straight-through gradient
        # Left in channels-last strides, as in the recorded runs: their CPU decoder rounds accordingly.
        return quant.permute(0, 3, 1, 2).to(z.dtype), losses, (None, None, indices)

    @torch.no_grad()
    def _update_usage(self, indices: Tensor) -> Tensor:
        """Rolls the indices into the window; returns the share of codes in it, a float32 scalar."""
        seen = indices
        if self.show_usage:
            newest = indices[-USAGE_WINDOW:]
            self.codebook_used.copy_(torch.cat([self.codebook_used[newest.numel() :], newest]))
            seen = self.codebook_used.long()
        # A scatter, not unique(): its output shape does not depend on the data, so no device sync and no graph break.
        hit = torch.zeros(self.codebook_size, device=indices.device).scatter_(0, seen, 1.0)
        return hit.mean()

    def get_codebook_entry(
        self, indices: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> Tensor:
        """Looks codes up.

        indices: any shape of integers. Without `shape` the result has the shape of indices plus (C,); otherwise
        `shape` is (B, C, H, W), or (B, H, W, C) where not `channel_first`, and so is the result.
        Raises ValueError if the number of indices or C does not fit `shape`.
        """
        entries = self._normalise(self.embedding(indices)).to(self.embedding.weight.dtype)
        if shape is None:
            return entries
        batch, channels, height, width = shape if channel_first else (shape[0], shape[3], shape[1], shape[2])
        if indices.numel() != batch * height * width or channels != self.codebook_embed_dim:
            raise ValueError(
                f"{indices.numel()} codes of a codebook with {self.codebook_embed_dim} channels do not fill a latent "
                f"of shape {tuple(shape)}; give {'(B, C, H, W)' if channel_first else '(B, H, W, C)'} with "
                f"B*H*W = {indices.numel()} and C = {self.codebook_embed_dim}"
            )
        entries = entries.view(batch, height, width, channels)
        return entries.permute(0, 3, 1, 2).contiguous() if channel_first else entries
