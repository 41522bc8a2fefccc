"""Keys and values of the rows computed so far, in memory allocated once.

cache = StaticCache(layers=12, batch=16, heads=12, rows=257, head_dim=64, device="cpu", dtype=torch.float32)
k, v = cache.update(layer, positions, k, v, length)      # the first `length` rows, the new ones included
"""

import torch
from torch import Tensor


class StaticCache:
    """One (B, H, S, D) pair of tensors a layer. S is the whole sequence; rows past the filled part hold old values."""

    def __init__(
        self, layers: int, batch: int, heads: int, rows: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (batch, heads, rows, head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]

    @property
    def rows(self) -> int:
        """Rows there is room for."""
        return self.keys[0].shape[2]

    def fits(self, batch: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether `batch` samples of this kind go in."""
        keys = self.keys[0]
        return len(keys) >= batch and keys.device == device and keys.dtype == dtype

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Stores k and v (b, H, s, D) at rows `positions` (s,) of the first b samples.

        Returns the first `length` rows of those samples as views, (b, H, length, D) each.
        """
        keys, values = self.keys[layer][: len(k)], self.values[layer][: len(v)]
        keys.index_copy_(2, positions, k.to(keys.dtype))
        values.index_copy_(2, positions, v.to(values.dtype))
        return keys[:, :, :length], values[:, :, :length]
