"""Parallel groups: tokens of distant regions are drawn together (PAR, arXiv 2412.15119, section 3).

The first `group_size` tokens are read one by one. The last of them and `group_size - 1` special vectors are the inputs of
the first group; from then on a group's tokens are the inputs of the next group.
"""

from functools import cached_property
from math import isqrt

import torch
from torch import Tensor

from autoregressive.models.layouts.base import Holds, Layout, Row, register_layout


@register_layout("parallel")
class ParallelLayout(Layout):
    """Groups of tokens at one offset in each of group_size regions. Raises ValueError where these do not fit the grid."""

    group_size: int = 4  # tokens a decode step draws, a square number

    def __post_init__(self) -> None:
        side = isqrt(max(self.group_size, 0)) if isinstance(self.group_size, int) else 0
        if side < 1 or side**2 != self.group_size:
            raise ValueError(f"--ar-token-num must be a square number (1, 4, 16, …), got {self.group_size}")
        if self.grid_size < 1 or self.grid_size % side:
            raise ValueError(
                f"a grid of {self.grid_size}x{self.grid_size} tokens cannot be cut into {side}x{side} regions of equal "
                f"size; choose an --image-size whose grid {side} divides, or another --ar-token-num"
            )

    def places(self) -> Tensor:
        side = isqrt(self.group_size)
        region = self.grid_size // side
        raster = torch.arange(self.tokens).view(side, region, side, region)
        return raster.permute(1, 3, 0, 2).reshape(-1)  # offset in the region, then region

    @cached_property
    def groups(self) -> tuple[int, ...]:
        n = self.group_size
        return (1,) * n + (n,) * (self.tokens // n - 1)

    @cached_property
    def content(self) -> tuple[Row, ...]:
        conditions = [Row(Holds.CONDITION, i) for i in range(self.prefix)]
        tokens = [Row(Holds.TOKEN, t) for t in range(self.tokens)]
        special = [Row(Holds.SPECIAL, i) for i in range(self.group_size - 1)]
        return (*conditions, *tokens[: self.group_size], *special, *tokens[self.group_size :])

    @cached_property
    def block(self) -> tuple[int, ...]:
        single = self.prefix + self.group_size - 1  # rows before the first group
        return tuple(row if row < single else single + (row - single) // self.group_size for row in range(self.rows))

    def step_number(self, start: int) -> int:
        return start - 1 if start < self.group_size else start - self.group_size
