"""Points of two sets that lie in the other's balls, the neighbours behind precision and recall (arXiv 1904.06991).

    inside = points_inside((reference, samples), 3, torch.device("cpu"), 256 << 20, bar, Float64)

Around each point lies a ball that reaches to its third nearest other point. Distances are squared and go by tiles of bounded
size. `Float64` has them as exact as float64 is; `Float16` has the arithmetic of published evaluators, with its rounding.
"""

import math
from collections.abc import Iterator
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.precision import full_float32

# TensorFlow adds up float16 on a processor in eight lanes in float16, four packets of them in turn, halves of long rows.
_LANES, _PACKETS, _LONGEST = 8, 4, 1600
Sets = tuple[np.ndarray, np.ndarray]
Points = tuple[Tensor, Tensor]


class Float64:
    """Squared distances of points in float64. Two that differ by rounding count as equal."""

    def __init__(self, sets: Sets, device: torch.device):
        self.sets, self.device = sets, torch.device("cpu") if device.type == "mps" else device  # which has no float64

    def points(self, which: int, part: slice) -> Points:
        """Return points of a set (n, D) and their squared norms (n,)."""
        x = torch.from_numpy(self.sets[which][part].astype(np.float64)).to(self.device)
        return x, (x * x).sum(dim=1)

    def between(self, left: Points, right: Points, least: bool = False) -> Tensor:
        """Return squared distances (n, m); with `least`, less what rounding may have added."""
        (x, xx), (y, yy) = left, right
        norms = xx[:, None] + yy
        return (norms * (1 - 1e-13 * least) - 2 * (x @ y.T)).clamp_(min=0)


class Float16:
    """Squared distances |x|² - 2 x·y + |y|² of which every step is rounded to float16, as TensorFlow has them on a processor.

    Sums of squares have TensorFlow's order of summation; products are rounded once. Sets whose distances may overflow
    float16 are taken in float32.
    """

    def __init__(self, sets: Sets, device: torch.device):
        self.sets, self.device = sets, device
        longest = (math.sqrt(float(np.square(features, dtype=np.float64).sum(axis=1).max())) for features in sets)
        self.dtype = torch.float16 if (2 * max(longest)) ** 2 < 60_000 else torch.float32

    def points(self, which: int, part: slice) -> Points:
        """Return points of a set (n, D), float32 with values of the dtype, and their squared norms (n,) in it."""
        x = torch.from_numpy(np.asarray(self.sets[which][part], np.float32)).to(self.device).to(self.dtype)
        return x.float(), _sums(x * x)

    def between(self, left: Points, right: Points, least: bool = False) -> Tensor:
        """Return squared distances (n, m) float32."""
        (x, xx), (y, yy) = left, right
        return (xx[:, None] - 2 * (x @ y.T).to(self.dtype) + yy).clamp_(min=0).float()


def points_inside(
    sets: Sets, neighbours: int, device: torch.device, memory: int, bar: tqdm, arithmetic: type[Float64] | type[Float16]
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the points of the first set (N, D) in a ball of the second (M, D), (N,) bool, and the converse, (M,).

    Args:
        memory: bytes of distances held at once.
        bar: gets the progress, N² + M² + N M distances in all.
    """
    side = math.isqrt(memory // 32)  # a tile, its steps, in float64
    with full_float32(), torch.inference_mode():
        distances = arithmetic(sets, device)
        first, second = (_squared_radii(distances, which, neighbours, side, bar) for which in range(2))
        inside = [torch.zeros(len(radii), dtype=torch.bool, device=radii.device) for radii in (first, second)]
        for rows in _parts(len(first), side):
            left = distances.points(0, rows)
            for columns in _parts(len(second), side):
                tile = distances.between(left, distances.points(1, columns), least=True)
                inside[0][rows] |= (tile <= second[columns]).any(dim=1)
                inside[1][columns] |= (tile <= first[rows, None]).any(dim=0)
                bar.update(tile.numel())
    return inside[0].cpu().numpy(), inside[1].cpu().numpy()


def _squared_radii(distances: Float64 | Float16, which: int, neighbours: int, side: int, bar: tqdm) -> Tensor:
    """Return the squared distance of each point of a set to its `neighbours`-th nearest other one, (N,).

    A point is its own nearest neighbour, so that the next one is looked for: in float16 another may be as near.
    """
    radii = []
    for rows in _parts(len(distances.sets[which]), side):
        left, nearest = distances.points(which, rows), None
        for columns in _parts(len(distances.sets[which]), side):
            tile = distances.between(left, distances.points(which, columns))
            nearest = tile if nearest is None else torch.cat([nearest, tile], dim=1)
            nearest = nearest.topk(min(neighbours + 1, nearest.shape[1]), dim=1, largest=False).values
            bar.update(tile.numel())
        radii.append(nearest[:, neighbours])
    return torch.cat(radii)


def _parts(count: int, side: int) -> Iterator[slice]:
    """Cuts range(count) into slices of at most `side`."""
    return (slice(start, min(start + side, count)) for start in range(0, count, side))


def _sums(x: Tensor) -> Tensor:
    """Return the sum of each row (n, D), in the order in which TensorFlow adds float16; (n,) of the same dtype."""
    if x.dtype != torch.float16:
        return x.sum(dim=1)
    dim = x.shape[1]
    if dim > _LONGEST:
        middle = -(-dim // (2 * _LANES)) * _LANES
        return _sums(x[:, :middle]) + _sums(x[:, middle:])
    packets = dim // _LANES
    lanes = x[:, : packets * _LANES].unflatten(1, (packets, _LANES)).unbind(1)
    in_turn = packets // _PACKETS * _PACKETS
    totals = [reduce(torch.add, lanes[first:in_turn:_PACKETS]) for first in range(min(in_turn, _PACKETS))]
    total = reduce(torch.add, [*totals, *lanes[in_turn:]], x.new_zeros(len(x), _LANES))
    rest = reduce(torch.add, x[:, packets * _LANES :].unbind(1), x.new_zeros(len(x)))
    return rest + total.float().sum(dim=1).half()
