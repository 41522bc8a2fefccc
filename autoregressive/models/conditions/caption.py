"""Caption: rows of text features before the tokens (LlamaGen, arXiv 2406.06525, section 2.2)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.conditions.base import Condition, register_condition


class CaptionProjection(nn.Module):
    """Projection of features, fc2(gelu(fc1(x))): the tanh form of gelu, no biases."""

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
        self.caption_dim = self.text_dim = caption_dim
        self.rows = tokens
        self.cap_proj = CaptionProjection(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(tokens, caption_dim) / caption_dim**0.5)

    @property
    def config(self) -> dict[str, Any]:
        return {"caption_dim": self.caption_dim, "tokens": self.rows}

    def read(self, value: Any) -> Tensor:
        """Return features (length, caption_dim) or (1, length, caption_dim), or those of an .npy file, as floats of two axes."""
        if isinstance(value, Path):
            value = read_file(value)
        if isinstance(value, str):
            raise ValueError(f"caption {shorten(value)} is a text: encode it first (ImagePipeline.encode)")
        if not isinstance(value, Tensor):
            value = torch.as_tensor(np.ascontiguousarray(value))
        if value.dim() == 3 and len(value) == 1:
            value = value[0]
        if value.dim() != 2 or value.shape[1] != self.caption_dim or not len(value) or not value.is_floating_point():
            raise ValueError(
                f"features are {value.dtype} of shape {tuple(value.shape)}; this model takes floats of shape (length, "
                f"{self.caption_dim}), those of the text encoder it was trained with"
            )
        if not value.isfinite().all():
            raise ValueError(f"features are not all finite: the encoder overflows in {value.dtype}")
        return value

    def stack(self, values: Sequence[Tensor], left: bool = True) -> tuple[Tensor, Tensor]:
        """Batch captions, of which the first `rows` rows count, in the weights' dtype."""
        weight = self.cap_proj.fc1.weight
        batch = weight.new_zeros(len(values), self.rows, self.caption_dim)
        mask = torch.zeros(len(values), self.rows, dtype=torch.bool, device=weight.device)
        for i, value in enumerate(values):
            count = min(len(value), self.rows)
            place = slice(self.rows - count, self.rows) if left else slice(count)
            batch[i, place], mask[i, place] = value[:count].to(weight.device, weight.dtype), True
        return batch, mask

    def example(self) -> Tensor:
        return torch.zeros(self.rows, self.caption_dim)

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


def read_file(path: Path) -> np.ndarray:
    """Return an array from an .npy file. Raises FileNotFoundError, ValueError for a damaged file."""
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no features at {path}") from error
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npy file of features ({error}); extract it again") from error
