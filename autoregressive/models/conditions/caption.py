"""Caption: rows of text features before the tokens (LlamaGen, arXiv 2406.06525, section 2.2)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.conditions.base import Condition, register_condition


class CaptionProjection(nn.Module):
    """fc2(gelu(fc1(x))), the tanh form of gelu, no biases."""

    def __init__(self, caption_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@register_condition("caption")
class CaptionEmbedder(Condition):
    """Projection of text features (B, T, caption_dim); a stored table of features means "no caption"."""

    def __init__(self, dim: int, grid_size: int = 0, *, caption_dim: int, tokens: int = 120):
        super().__init__()
        self.caption_dim, self.rows = caption_dim, tokens
        self.cap_proj = CaptionProjection(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(tokens, caption_dim) / caption_dim**0.5)

    @property
    def config(self) -> dict[str, Any]:
        return {"caption_dim": self.caption_dim, "tokens": self.rows}

    def check(self, value: Tensor) -> None:
        """Raise ValueError for another shape than (B, T, caption_dim)."""
        if tuple(value.shape[1:]) != (self.rows, self.caption_dim):
            expected = f"(B, {self.rows}, {self.caption_dim})"
            raise ValueError(f"caption features have shape {expected}, got {tuple(value.shape)}")

    def null(self, value: Tensor) -> Tensor:
        return self.uncond_embedding.to(value.dtype).expand_as(value)

    def embed(self, value: Tensor) -> Tensor:
        return self.cap_proj(value)

    def forward(self, value: Tensor, drop: Tensor | None = None) -> Tensor:
        return super().forward(value.to(self.cap_proj.fc1.weight.dtype), drop)

    def reset(self, normal: Callable[[Tensor, float], None], std: float) -> None:
        normal(self.uncond_embedding, self.caption_dim**-0.5)
