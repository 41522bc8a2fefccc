"""Neighbouring tokens: an anti-diagonal at a time, from the left neighbour and the upper one (NAR, arXiv 2503.10696, section 3).

Token (r, c) is predicted by the right head from the row of (r, c - 1), and by the below head from the row of (r - 1, c);
at the left and upper edge there is one of them, and the first token is predicted by both heads from the last condition.
"""

from functools import cached_property

import torch
from torch import Tensor

from autoregressive.models.layouts.base import Layout, Reader, register_layout

RIGHT, BELOW = 0, 1  # heads


@register_layout("neighbours")
class NeighbourLayout(Layout):
    """Anti-diagonals from the upper left corner on, the tokens of each from top to bottom."""

    def places(self) -> Tensor:
        cell = torch.arange(self.tokens)
        row, column = cell // self.grid_size, cell % self.grid_size
        return torch.argsort((row + column) * self.grid_size + row)

    @cached_property
    def groups(self) -> tuple[int, ...]:
        growing = tuple(range(1, self.grid_size + 1))
        return growing + growing[-2::-1]

    @cached_property
    def block(self) -> tuple[int, ...]:
        diagonals = [self.prefix + number for number, size in enumerate(self.groups) for _ in range(size)]
        return (*range(self.prefix), *diagonals)

    @cached_property
    def readers(self) -> tuple[tuple[Reader, ...], ...]:
        row_of = (self.prefix + self.raster).view(self.grid_size, self.grid_size).tolist()

        def neighbours(row: int, column: int) -> tuple[Reader, ...]:
            if row == column == 0:
                return Reader(self.prefix - 1, RIGHT), Reader(self.prefix - 1, BELOW)
            left = (Reader(row_of[row][column - 1], RIGHT),) if column else ()
            return left + ((Reader(row_of[row - 1][column], BELOW),) if row else ())

        return tuple(neighbours(*divmod(cell, self.grid_size)) for cell in self.order.tolist())

    def step_number(self, start: int) -> int:
        return start
