"""The rotary table of a square grid of tokens, and its application to queries and keys.

Rotary embedding: arXiv 2104.09864; its two-dimensional form: LlamaGen (2406.06525, section 2.2).
"""

import torch
from torch import Tensor


def rope_table_2d(grid_size: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines for every cell of the grid, in raster order.

    The first head_dim/4 channel pairs turn with the row, the others with the column; frequency i of a half is
    base^(-2i / (head_dim/2)).

    Returns: float32 (grid_size², head_dim/2, 2), last axis (cos, sin). On the CPU, so that every device gets the same.
    Raises ValueError where head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"2D RoPE needs a head dimension that 4 divides, got {head_dim}")
    half = head_dim // 2
    frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float32, device="cpu")[: half // 2] / half)  # (D/4,)
    angles = torch.arange(grid_size, dtype=torch.float32, device="cpu")[:, None] * frequencies  # (grid, D/4)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (grid, D/4, 2)
    rows = table[:, None].expand(-1, grid_size, -1, -1)
    columns = table[None].expand(grid_size, -1, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(grid_size**2, half, 2)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Turns adjacent channel pairs of x by the table's angles, in float32, and casts back.

    x: (B, S, H, D). table: (S, D/2, 2), or of each sample (B, S, D/2, 2); a row of zeros makes the position vanish.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, S, H, D/2, 2)
    cos, sin = table[..., None, :, 0], table[..., None, :, 1]  # (…, S, 1, D/2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)
