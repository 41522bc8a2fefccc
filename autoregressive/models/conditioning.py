"""What an image is asked for: a class or a caption, embedded as the rows before the image's tokens.

    rows = LabelEmbedder(1000, dim=768)(labels)              # (B,) -> (B, 1, dim)
    rows = CaptionEmbedder(2048, dim=1280)(features)         # (B, 120, 2048) -> (B, 120, dim)

In training a condition is dropped now and then, which gives guidance its unconditional half
(classifier-free guidance, arXiv 2207.12598).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def choose_dropped(drop: Tensor | None, batch: int, probability: float, training: bool, device: torch.device) -> Tensor:
    """Which samples lose their condition: `drop` (bool (B,)) where given, else drawn in training, else none."""
    if drop is not None:
        return drop.to(device=device, dtype=torch.bool)
    if training and probability > 0:
        return torch.rand(batch, device=device) < probability
    return torch.zeros(batch, dtype=torch.bool, device=device)


class LabelEmbedder(nn.Module):
    """Class embeddings; the row after the last class means "no class"."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float = 0.1):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def null(self, labels: Tensor) -> Tensor:
        """The "no class" condition for as many samples as `labels` has."""
        return torch.full_like(labels, self.num_classes, dtype=torch.long)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """labels: whole numbers (B,). drop: bool (B,), the samples to embed as "no class". Returns (B, 1, dim)."""
        dropped = choose_dropped(drop, len(labels), self.dropout_prob, self.training, labels.device)
        return self.embedding_table(torch.where(dropped, self.num_classes, labels.long())).unsqueeze(1)


class CaptionProjection(nn.Module):
    """fc2(gelu(fc1(x))), the tanh form of gelu, no biases."""

    def __init__(self, caption_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Projects text features; a stored table of features means "no caption"."""

    def __init__(self, caption_dim: int, dim: int, tokens: int = 120, dropout_prob: float = 0.1):
        super().__init__()
        self.dropout_prob = dropout_prob
        self.cap_proj = CaptionProjection(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(tokens, caption_dim) / caption_dim**0.5)

    def null(self, features: Tensor) -> Tensor:
        """The "no caption" condition for as many samples as `features` has."""
        return self.uncond_embedding.to(features.dtype).expand_as(features)

    def forward(self, features: Tensor, drop: Tensor | None = None) -> Tensor:
        """features: (B, T, caption_dim). drop: bool (B,). Returns (B, T, dim)."""
        dropped = choose_dropped(drop, len(features), self.dropout_prob, self.training, features.device)
        features = features.to(self.cap_proj.fc1.weight.dtype)
        return self.cap_proj(torch.where(dropped[:, None, None], self.null(features), features))
