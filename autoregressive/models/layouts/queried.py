"""Queries: each token is read from a row of its own that asks for its cell, so any order and any groups do (LPD, arXiv 2507.01957).

Group i sees the tokens of the groups before it and its own queries. An image has an order of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from autoregressive.models.layouts.base import Holds, Layout, Reader, Row, register_layout
from autoregressive.models.layouts.group_sizes import group_sizes
from autoregressive.models.layouts.locality import locality_order

# By cells a side, the passes of the published figures; of other grids 5/4 of a side.
PUBLISHED_PASSES = {16: 20, 32: 48}


@register_layout("queried")
class QueriedLayout(Layout):
    """Tokens in any order, drawn in groups of any sizes; the rows are the tokens but for the last group, then N queries.

    Raises ValueError for sizes that do not sum to N.
    """

    own_orders = True
    group_sizes: Sequence[int] | int = 0  # tokens of each group, sum N, or how many groups, 0 for as many as published
    repulsion: int = -1  # of an image's order, see locality_order; -1 for that of the published figures

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.group_sizes
        if sizes == 0:
            sizes = min(PUBLISHED_PASSES.get(self.grid_size, max(5 * self.grid_size // 4, 1)), self.tokens)
        if isinstance(sizes, int):
            sizes = group_sizes(self.tokens, sizes)
        whole = isinstance(sizes, list | tuple) and all(isinstance(size, int) for size in sizes)
        if not whole or sum(sizes) != self.tokens or min(sizes) < 1:
            raise ValueError(f"groups are 1 token or more each and {self.tokens} in all, got {sizes}")
        if not isinstance(self.repulsion, int) or self.repulsion < -1:
            raise ValueError(f"repulsion is a number of cells, 0 or more, got {self.repulsion}")
        object.__setattr__(self, "group_sizes", tuple(sizes))
        if self.repulsion == -1:
            object.__setattr__(self, "repulsion", 2 if self.grid_size < 32 else 4)

    @property
    def config(self) -> dict:
        return {**super().config, "group_sizes": list(self.groups)}

    def with_groups(self, groups: Sequence[int] | int) -> Layout:
        return _regrouped(self, groups if isinstance(groups, int) else tuple(int(size) for size in groups))

    def adapted(self, steps: int = 0, repulsion: int = -1, known: int = 0) -> Layout:
        layout = self if repulsion < 0 else replace(self, repulsion=repulsion)
        layout = layout.with_groups(steps) if steps else layout
        if known:  # in one group, and as many passes after it as there are behind so many tokens
            ends = [end for end in accumulate(layout.groups) if end > known]
            layout = layout.with_groups([known, *(end - start for start, end in pairwise([known, *ends]))])
        return layout

    def draw_order(self, seed: int, known: Sequence[int] = ()) -> Tensor:
        order = locality_order(self.grid_size, self.groups, self.repulsion, seed % 2**32, known)
        return torch.tensor(order, device="cpu")

    def places(self) -> Tensor:
        return torch.arange(self.tokens)  # where no order is given

    @property
    def groups(self) -> tuple[int, ...]:
        assert isinstance(self.group_sizes, tuple)
        return self.group_sizes

    @cached_property
    def content(self) -> tuple[Row, ...]:
        conditions = [Row(Holds.CONDITION, i) for i in range(self.prefix)]
        tokens = [Row(Holds.TOKEN, t) for t in range(self.tokens - self.groups[-1])]
        return (*conditions, *tokens, *(Row(Holds.QUERY, t) for t in range(self.tokens)))

    @cached_property
    def block(self) -> tuple[int, ...]:
        # Between the blocks of tokens 2, 4, … after the conditions', those of the queries of the next group.
        group = [i for i, size in enumerate(self.groups) for _ in range(size)]
        last = self.prefix - 1
        tokens = [last + 2 * (i + 1) for i in group[: -self.groups[-1]]]
        return (*range(self.prefix), *tokens, *(last + 2 * i + 1 for i in group))

    @cached_property
    def kept(self) -> tuple[bool, ...]:
        return tuple(row.holds is not Holds.QUERY for row in self.content)

    @cached_property
    def readers(self) -> tuple[tuple[Reader, ...], ...]:
        return tuple((Reader(row),) for row in range(self.rows - self.tokens, self.rows))

    @property
    def cache_rows(self) -> int:
        return self.prefix + self.tokens


@lru_cache(maxsize=256)  # a layout keeps its passes
def _regrouped(layout: QueriedLayout, groups: tuple[int, ...] | int) -> QueriedLayout:
    return replace(layout, group_sizes=groups)
