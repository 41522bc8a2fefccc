"""Locality-aware orders: each group near what is drawn already, its tokens far from each other (LPD, arXiv 2507.01957, section 3.3)."""

import random
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

# A cell whose neighbours drawn already weigh so much is near them: 1 beside it, 1/√2 across a corner.
NEAR = 1.0


def locality_order(
    grid_size: int, groups: Sequence[int], repulsion: int, seed: int, first: Sequence[int] = ()
) -> list[int]:
    """Draw an order of the cells of a square grid, (N,), with Python's generator of the seed (0 to 2**32 - 1), as published.

    repulsion: cells of a group are more than so many rows or columns apart, as far as they are chosen for nearness.
    first: cells that stand first, which are known.
    """
    shuffler = random.Random(seed)
    y, x = np.divmod(np.arange(grid_size**2), grid_size)
    weights = np.zeros((grid_size + 2, grid_size + 2))  # of what is drawn beside a cell, with a border
    around = 1 / np.sqrt([[2, 1, 2], [1, np.inf, 1], [2, 1, 2]])
    left = np.ones(grid_size**2, bool)
    order: list[int] = []

    def take(cells: Sequence[int]) -> None:
        for cell in cells:
            row, column = divmod(cell, grid_size)
            weights[row : row + 3, column : column + 3] += around
            left[cell] = False
        order.extend(cells)

    def near_cells(size: int) -> tuple[list[int], list[int]]:
        """Return up to `size` cells beside those drawn, never none, and all other cells that are left."""
        cells = np.flatnonzero(left).tolist()
        if left.all():
            return [cells.pop(shuffler.randint(0, len(left) - 1))], cells
        shuffler.shuffle(cells)
        proximity = weights[1:-1, 1:-1].ravel()
        cells.sort(key=proximity.tolist().__getitem__, reverse=True)
        near = int((proximity[cells] >= NEAR).sum())
        picked, passed, taken = [], [], np.zeros((grid_size, grid_size), bool)
        for at, cell in enumerate(cells[:near]):
            if len(picked) == size:
                return picked, cells[near:] + passed + cells[at:near]
            row, column = divmod(cell, grid_size)
            if taken[row, column]:
                passed.append(cell)
                continue
            picked.append(cell)
            rows, columns = (slice(max(place - repulsion, 0), place + repulsion + 1) for place in (row, column))
            taken[rows, columns] = True
        return picked, cells[near:] + passed

    def squared_distances(cells: list[int], picked: list[int]) -> np.ndarray:
        """Return the squared distance of each cell to the closest one picked."""
        return ((y[cells, None] - y[picked]) ** 2 + (x[cells, None] - x[picked]) ** 2).min(axis=1)

    take(first)
    for end in accumulate(groups):
        if (size := end - len(order)) <= 0:
            continue
        picked, others = near_cells(size)
        missing = size - len(picked)
        if missing >= len(others):
            picked += others
        elif missing:
            distances = squared_distances(others, picked)
            for _ in range(missing):  # the farthest point, the first of equal ones
                picked.append(others[int(distances.argmax())])
                distances = np.minimum(distances, squared_distances(others, picked[-1:]))
        take(picked)
    return order
