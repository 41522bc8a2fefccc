"""Which points of two sets lie in the other's balls, the neighbours behind precision and recall (arXiv 1904.06991).

    inside = exact_inside((reference, samples), 3, torch.device("cpu"), 256 << 20, bar)
    inside = float16_inside((reference, samples), 3, torch.device("cpu"), 256 << 20, bar)

Around each point lies a ball that reaches to its third nearest other point. Both go by tiles of distances of bounded size.
The first is exact. The second has the arithmetic of published evaluators, float16, with its rounding.
"""

import math
from collections.abc import Iterator
from itertools import combinations_with_replacement, pairwise, product

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.precision import full_float32

_ROWS = 1024  # rows handled at once where a block is not sized by a limit
_SEGMENT = 32  # distances of which the smallest is looked at first
_SPARE = 5  # neighbours kept beyond the asked ones, so that rounding rarely leaves a doubt
_ABSENT = -1e30  # stands for "no such point" among values between -3 and 0
_MILLION = 1 << 20

# Published evaluators take distances in blocks of this side, and one in float32 where any entry of it overflows float16.
PUBLISHED_BLOCK = 10_000
_SIDE = 2048  # of a tile of them, so that its few passes stay in a processor's cache
# How TensorFlow adds up float16 on a processor: eight lanes in float16, four packets of them in turn, halves of long rows.
_LANES, _PACKETS, _LONGEST = 8, 4, 1600

Sets = tuple[np.ndarray, np.ndarray]


def exact_inside(
    sets: Sets, neighbours: int, device: torch.device, memory: int, bar: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    """Which points of the first set (N, D) lie in a ball of the second (M, D), (N,) bool, and the converse, (M,).

    As by differences in float64. memory: bytes of distances held at once. bar: told of N (N - 1) / 2 + M (M - 1) / 2 + N M.
    """
    with full_float32(), torch.inference_mode():
        engine = _Distances(sets, device, memory)
        first, second = engine.inside([engine.squared_radii(i, neighbours, bar) for i in range(2)], bar)
    return first, second


def float16_inside(
    sets: Sets, neighbours: int, device: torch.device, memory: int, bar: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    """As `exact_inside`, by distances |x|² - 2 x·y + |y|² of which every step is rounded to float16.

    Such distances are those of TensorFlow on a processor to nearly the last bit: sums of squares have its order of
    summation, products are rounded once. bar: told of N² + M² + N M.
    """
    side = max(_SEGMENT, min(_SIDE, math.isqrt(memory // 16)))  # products, their sums, in two formats
    with full_float32(), torch.inference_mode():
        points = [_RoundedPoints(features, device) for features in sets]
        radii = [_float16_radii(each, neighbours, side, bar) for each in points]
        inside = [torch.zeros(len(features), dtype=torch.bool, device=device) for features in sets]
        for block_rows, block_columns in product(*(_parts(each.all, PUBLISHED_BLOCK) for each in points)):
            dtype = _block_dtype(points[0], block_rows, points[1], block_columns, side)
            for rows in _parts(block_rows, side):
                left = points[0].rows(rows, dtype)
                for columns in _parts(block_columns, side):
                    products = (left @ points[1].rows(columns, dtype).T).to(dtype)
                    block = _distances(points[0].squares(rows, dtype), products, points[1].squares(columns, dtype))
                    inside[1][_slice(columns)] |= (block <= radii[0][_slice(rows), None]).any(dim=0)
                    inside[0][_slice(rows)] |= (block <= radii[1][_slice(columns)]).any(dim=1)
                    bar.update(block.numel())
    return inside[0].cpu().numpy(), inside[1].cpu().numpy()


class _RoundedPoints:
    """A set's points (N, D), rounded to a dtype, and their squared norms in it."""

    def __init__(self, features: np.ndarray, device: torch.device):
        self.features, self.device = features, device
        self.all = range(len(features))
        self._squares: dict[torch.dtype, Tensor] = {}

    def rows(self, span: range, dtype: torch.dtype) -> Tensor:
        """Points of a span, (n, D) float32 with values of `dtype`."""
        values = torch.from_numpy(np.asarray(self.features[_slice(span)], np.float32)).to(self.device)
        return values.to(dtype).float()

    def squares(self, span: range, dtype: torch.dtype) -> Tensor:
        """Squared norms of a span's points, (n,) `dtype`."""
        if dtype not in self._squares:
            parts = (self.rows(part, dtype).to(dtype) for part in _parts(self.all, _ROWS))
            self._squares[dtype] = torch.cat([_sums(part * part) for part in parts])
        return self._squares[dtype][_slice(span)]


def _float16_radii(points: _RoundedPoints, neighbours: int, side: int, bar: tqdm) -> Tensor:
    """The squared distance from each point to its `neighbours`-th nearest other one, (N,) float32."""
    nearest = torch.full((len(points.all), neighbours + 1), math.inf, device=points.device)

    def keep(rows: range, block: Tensor) -> None:
        # A point is its own neighbour: rounding may put another before it.
        both = torch.cat([nearest[_slice(rows)], block], dim=1)
        nearest[_slice(rows)] = both.topk(neighbours + 1, dim=1, largest=False).values
        bar.update(block.numel())

    for block_rows, block_columns in combinations_with_replacement(_parts(points.all, PUBLISHED_BLOCK), 2):
        dtype = _block_dtype(points, block_rows, points, block_columns, side)
        for rows in _parts(block_rows, side):
            left, left_squares = points.rows(rows, dtype), points.squares(rows, dtype)
            for columns in _parts(block_columns, side):
                if columns.start < rows.start:
                    continue  # these products were made the other way round; their sums round differently
                products = (left @ points.rows(columns, dtype).T).to(dtype)
                keep(rows, _distances(left_squares, products, points.squares(columns, dtype)))
                if columns != rows:
                    keep(columns, _distances(points.squares(columns, dtype), products.T, left_squares))
    return nearest[:, neighbours]


def _distances(left: Tensor, products: Tensor, right: Tensor) -> Tensor:
    """max(|x|² - 2 x·y + |y|², 0), every step rounded to the products' dtype: (n,), (n, m), (m,) to (n, m) float32."""
    return (left[:, None] - 2 * products + right).clamp_(min=0).float()


def _block_dtype(x: _RoundedPoints, rows: range, y: _RoundedPoints, columns: range, side: int) -> torch.dtype:
    """float16, or float32 where a distance of the block, or a step on the way to it, is beyond float16."""
    half = torch.float16
    longest = [float(each.squares(part, half).max()) for each, part in ((x, rows), (y, columns))]
    # No step can be larger than this, rounding included.
    if (math.sqrt(longest[0]) + math.sqrt(longest[1])) ** 2 < 60_000:
        return half
    for r, c in product(_parts(rows, side), _parts(columns, side)):
        products = (x.rows(r, half) @ y.rows(c, half).T).to(half)
        if not _distances(x.squares(r, half), products, y.squares(c, half)).isfinite().all():
            return torch.float32
    return half


def _sums(x: Tensor) -> Tensor:
    """The sum of each row (n, D), in the order in which TensorFlow adds float16; (n,) of the same dtype."""
    if x.dtype != torch.float16:
        return x.sum(dim=1)
    dim = x.shape[1]
    if dim > _LONGEST:
        middle = -(-dim // (2 * _LANES)) * _LANES
        return _sums(x[:, :middle]) + _sums(x[:, middle:])
    packets = dim // _LANES
    lanes = x[:, : packets * _LANES].unflatten(1, (packets, _LANES)).unbind(1)
    in_turn = packets // _PACKETS * _PACKETS
    totals = [x.new_zeros(len(x), _LANES)]
    if in_turn:
        totals = list(lanes[:_PACKETS])
        for start in range(_PACKETS, in_turn, _PACKETS):
            totals = [total + lane for total, lane in zip(totals, lanes[start : start + _PACKETS], strict=True)]
    total = totals[0]
    for other in (*totals[1:], *lanes[in_turn:]):
        total = total + other
    rest = x.new_zeros(len(x))
    for column in x[:, packets * _LANES :].unbind(1):
        rest = rest + column
    return rest + total.float().sum(dim=1).half()


def _parts(span: range, side: int) -> list[range]:
    """A range in consecutive parts of at most `side`."""
    edges = [*range(span.start, span.stop, side), span.stop]
    return [range(*edge) for edge in pairwise(edges)]


class _Distances:
    """Squared distances between points of two sets, by tiles with a bound of their rounding, and exact where asked.

    A tile is one matrix product. A point x, centred and scaled, becomes the row [x, 1, -s/2] or [x, -s/2, 1] with
    s = (1 - beta) |x|², and the product of two rows is -lower/2, where

        lower <= |x - y|² <= lower + 2 beta (|x|² + |y|²).

    Why that holds: the product's D + 2 terms add up, in absolute values, to at most (|x| + |y|)² / 2, so in any order of
    summation it is off by at most (D + 2) u times that, u being half the distance from 1 to the next number (Higham,
    Accuracy and Stability of Numerical Algorithms, 3.1); with (|x| + |y|)² <= 2 (|x|² + |y|²) and the roundings of
    the entries themselves, beta = 2 (D + 10) u covers it. All lengths are in units of a power of two, so that scaling
    rounds nothing and the longest |x| is at most 1: numbers too small for float32 are covered by a constant.
    """

    def __init__(self, sets: tuple[np.ndarray, np.ndarray], device: torch.device, memory: int):
        self.sets = sets
        self.device = device
        self.memory = memory
        count = sum(len(features) for features in sets)
        self.dim = sets[0].shape[1]
        self.centre = sum(block.sum(axis=0) for i in range(2) for _, block in self._blocks(i)) / count
        # Any point near the mean will do: for features of float32 one of float32, from which differences are cheap.
        self.narrow = all(features.dtype in (np.float16, np.float32) for features in sets)
        self.narrow = self.narrow and float(np.abs(self.centre).max()) < 1e37
        if self.narrow:
            self.centre = self.centre.astype(np.float32).astype(np.float64)
        self.squares = [np.empty(len(features)) for features in sets]
        for i in range(2):
            for start, block in self._blocks(i):
                block -= self.centre
                with np.errstate(over="ignore"):
                    self.squares[i][start : start + len(block)] = np.einsum("ij,ij->i", block, block)
        longest = math.sqrt(max(float(squares.max()) for squares in self.squares))
        if not longest < 1e150:
            raise ValueError(f"features up to {longest:.3g} from their mean: their squared distances overflow")
        self.scale = 2.0 ** math.ceil(math.log2(max(longest, 1e-150)))
        self.narrow = self.narrow and 1e-37 < longest < 1e37
        self.squares = [squares / self.scale**2 for squares in self.squares]
        self._buffers: dict[str, torch.Tensor] = {}

    def squared_radii(self, which: int, neighbours: int, bar: tqdm) -> np.ndarray:
        """Squared distance of every point of a set to its `neighbours`-th nearest other one, (N,), exact."""
        count = len(self.sets[which])
        kept = min(neighbours + _SPARE, count - 1)
        nearest = torch.full((count, kept), -math.inf, device=self.device)  # -lower/2, the largest first
        others = torch.zeros((count, kept), dtype=torch.int64, device=self.device)
        # Half of the tiles are not needed, so eight a side where they stay large enough for a fast product.
        spans = _spans(count, min(math.isqrt(self.memory // 4), max(512, -(-count // 8))))
        for i, rows in enumerate(spans):
            left = self._tile(which, rows, True, "left")
            for columns in spans[i:]:  # the other half of the distances is the same
                right = self._tile(which, columns, False, "right")
                products = self._products(left, right)
                if columns == rows:
                    products.fill_diagonal_(-math.inf)
                else:
                    flipped = products.T[: len(columns)]
                    _keep_largest(nearest[_slice(columns)], others[_slice(columns)], flipped, rows.start)
                _keep_largest(nearest[_slice(rows)], others[_slice(rows)], products[: len(rows)], columns.start)
                bar.update(len(rows) * (len(rows) - 1) // 2 if columns == rows else len(rows) * len(columns))
        lower = np.maximum(-2.0 * nearest.cpu().numpy().astype(np.float64), 0)  # of a point that is not there: infinite
        others = others.cpu().numpy()
        present = lower < -_ABSENT
        others[~present] = 0
        upper = lower + self._width(which, np.arange(count)[:, None], which, others, np.float32)
        upper[~present] = math.inf
        # The asked neighbour is no farther than the asked smallest upper bound; who is surely farther is not computed.
        candidates = lower <= np.partition(upper, neighbours - 1, axis=1)[:, neighbours - 1, None]
        exact = np.full(lower.shape, math.inf)
        rows, slots = np.nonzero(candidates & present)
        exact[rows, slots] = self._exact(which, rows, which, others[rows, slots])
        radii = np.partition(exact, neighbours - 1, axis=1)[:, neighbours - 1].copy()
        # Points that were not kept are no nearer than the last kept one. Where that is nearer than the radius, look again.
        if kept < count - 1:
            doubtful = np.flatnonzero(lower.max(axis=1) < radii)
            self._search_again(which, doubtful, neighbours, radii)
        return radii

    def inside(self, radii: list[np.ndarray], bar: tqdm) -> list[np.ndarray]:
        """Which points of the first set lie in a ball of the second, (N,) bool, and the converse, (M,); exact.

        radii: the squared radii of the balls around the first and the second set's points.
        """
        flags = [np.zeros(len(features), bool) for features in self.sets]
        side = math.isqrt(self.memory // 8)  # the products, and once more with radii added
        for rows in _spans(len(self.sets[1]), side):
            left = self._tile(1, rows, True, "left")
            for columns in _spans(len(self.sets[0]), side):
                right = self._tile(0, columns, False, "right")
                products = self._products(left, right)
                sums = self._buffer("sums", products.shape, np.float32)
                self._find_inside(1, rows, 0, columns, products, sums, radii[0], flags[1])
                self._find_inside(0, columns, 1, rows, products.T, sums.T, radii[1], flags[0])
                bar.update(len(rows) * len(columns))
        return flags

    def _find_inside(
        self,
        which: int,
        rows: range,
        other: int,
        columns: range,
        products: torch.Tensor,
        sums: torch.Tensor,
        radii: np.ndarray,
        flags: np.ndarray,
    ) -> None:
        """Sets `flags` of the points `rows` that are in a ball around one of the points `columns` of the other set.

        products: -lower/2, (rows, columns) and padding. sums: as large, to work in. radii: squared, of the other set.
        """
        missing = np.flatnonzero(~flags[_slice(rows)])
        if not len(missing):
            return
        half = np.full(products.shape[1], 0.0, np.float32)
        half[: len(columns)] = np.nextafter((radii[_slice(columns)] / 2).astype(np.float32), np.float32(math.inf))
        torch.add(products, torch.from_numpy(half).to(self.device), out=sums)
        possible = sums.amax(dim=1).cpu().numpy()[missing] >= 0  # rounding a sum leaves its sign
        missing = missing[possible]
        if not len(missing):
            return
        # Surely in: the upper bound is inside too. Each side of the bound's width goes to its own side of the comparison.
        beta = self._beta(np.float32)
        taken = beta * self.squares[other][_slice(columns)] + self._floor(np.float32) * 2
        reduced = (radii[_slice(columns)] / 2 - taken).astype(np.float32)
        half[: len(columns)] = np.nextafter(reduced, np.float32(-math.inf))
        reached = torch.add(products, torch.from_numpy(half).to(self.device), out=sums).amax(dim=1).cpu().numpy()
        sure = reached.astype(np.float64)[missing] * (1 - 1e-6) >= beta * self.squares[which][_slice(rows)][missing]
        flags[rows.start + missing[sure]] = True
        doubtful = missing[~sure]
        balls: np.ndarray | None = None
        for group in _groups(doubtful, products.shape[1]):
            lower = -2.0 * products.index_select(0, torch.from_numpy(group).to(self.device))[:, : len(columns)]
            lower = lower.cpu().numpy().astype(np.float64)
            points = rows.start + group
            possible = lower <= radii[_slice(columns)]
            if possible.sum() > 64 * len(group):
                # So many that products in float64, with their much smaller bound, are worth their price.
                if balls is None:
                    balls = self._tile(other, columns, False, "", np.float64)
                lower = -2 * (self._tile(which, points, True, "", np.float64) @ balls.T)[: len(group), : len(columns)]
                upper = lower + self._width(which, points[:, None], other, np.asarray(columns), np.float64)
                flags[points[(upper <= radii[_slice(columns)]).any(axis=1)]] = True
                possible = lower <= radii[_slice(columns)]
            # The deepest first: most that are in are in that ball.
            order = np.argmax(np.where(possible, radii[_slice(columns)] - lower, -math.inf), axis=1)
            self._compare(which, points, other, columns.start + order, radii, flags)
            chosen, balls_of = np.nonzero(possible & ~flags[points][:, None])
            for start in range(0, len(chosen), 4 * _ROWS):
                part = slice(start, start + 4 * _ROWS)
                open_still = ~flags[points[chosen[part]]]
                self._compare(
                    which,
                    points[chosen[part]][open_still],
                    other,
                    columns.start + balls_of[part][open_still],
                    radii,
                    flags,
                )

    def _compare(
        self, which: int, points: np.ndarray, other: int, centres: np.ndarray, radii: np.ndarray, flags: np.ndarray
    ) -> None:
        """Sets the flags of points (n,) that are in the ball around the other set's point at the same place, exactly."""
        flags[points[self._exact(which, points, other, centres) <= radii[centres]]] = True

    def _search_again(self, which: int, points: np.ndarray, neighbours: int, radii: np.ndarray) -> None:
        """Sets the squared radii of `points` (n,), for which too many others are about equally near, exactly."""
        count = len(self.sets[which])
        side = max(1, self.memory // (16 * count))
        for start in range(0, len(points), side):
            group = points[start : start + side]
            left = self._tile(which, group, True, "", np.float64)[: len(group)]
            lower = np.empty((len(group), count))
            for columns in _spans(count, 2 * _ROWS):
                right = self._tile(which, columns, False, "", np.float64)[: len(columns)]
                lower[:, _slice(columns)] = -2 * (left @ right.T)
            np.maximum(lower, 0, out=lower)
            lower[np.arange(len(group)), group] = math.inf
            for row, point in zip(lower, group):
                upper = row + self._width(which, np.asarray(point), which, np.arange(count), np.float64)
                candidates = np.flatnonzero(row <= np.partition(upper, neighbours - 1)[neighbours - 1])
                candidates = candidates[np.argsort(row[candidates], kind="stable")]
                nearest = np.full(neighbours, math.inf)
                for first in range(0, len(candidates), _ROWS):
                    if row[candidates[first]] >= nearest[-1]:
                        break  # none of the others is nearer: with many duplicates, soon
                    part = candidates[first : first + _ROWS]
                    exact = self._exact(which, np.full(len(part), point), which, part)
                    nearest = np.sort(np.concatenate([nearest, exact]))[:neighbours]
                radii[point] = nearest[-1]

    def _exact(self, which: int, points: np.ndarray, other: int, others: np.ndarray) -> np.ndarray:
        """Squared distances of pairs, (n,) float64, by differences. The same for (x, y) and (y, x), bit for bit."""
        squares = np.empty(len(points))
        step = _ROWS // 4
        for start in range(0, len(points), step):
            part = slice(start, start + step)
            difference = np.asarray(self.sets[which][points[part]], np.float64) - self.sets[other][others[part]]
            difference *= difference
            squares[part] = difference.sum(axis=1)
        return squares / self.scale**2

    def _blocks(self, which: int) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(self.sets[which]), _ROWS):
            yield start, np.array(self.sets[which][start : start + _ROWS], np.float64)

    def _tile(
        self, which: int, points: range | np.ndarray, left: bool, buffer: str, dtype: type = np.float32
    ) -> np.ndarray:
        """The rows of `points` for a product, (n, D + 2), n rounded up to whole segments by points that are not there.

        left: [x, 1, -s/2], else [x, -s/2, 1]. buffer: the name of memory to use again, '' for memory of its own.
        """
        shape = (-(-len(points) // _SEGMENT) * _SEGMENT, self.dim + 2)
        tile = self._buffer(buffer, shape, dtype).numpy() if buffer else np.empty(shape, dtype)
        one, square = (self.dim, self.dim + 1) if left else (self.dim + 1, self.dim)
        for start in range(0, len(points), _ROWS):
            part = points[start : start + _ROWS]
            part = _slice(part) if isinstance(part, range) else part
            features = self.sets[which][part]
            place = tile[start : start + len(features), : self.dim]
            if dtype is np.float32 and self.narrow:
                # One rounding, that of the difference, as by way of float64.
                np.subtract(features, self.centre.astype(np.float32), out=place)
                place *= np.float32(1 / self.scale)
            else:
                place[...] = (np.asarray(features, np.float64) - self.centre) / self.scale
            half = (1 - self._beta(dtype)) / 2 * self.squares[which][part]
            tile[start : start + len(features), square] = self._floor(dtype) / 2 - half
        tile[:, one] = 1
        tile[len(points) :, : self.dim] = 0
        tile[len(points) :, square] = _ABSENT
        return tile

    def _products(self, left: np.ndarray, right: np.ndarray) -> torch.Tensor:
        """left right^T on the device, in memory that the next call uses again."""
        if self.device.type == "cpu":
            products = self._buffer("products", (len(left), len(right)), np.float32)
            np.matmul(left, right.T, out=products.numpy())  # numpy's BLAS: torch's is slow on some processors
            return products
        return torch.from_numpy(left).to(self.device) @ torch.from_numpy(right).to(self.device).T

    def _buffer(self, name: str, shape: tuple[int, int], dtype: type) -> torch.Tensor:
        """Uninitialised memory that calls with the same name share; tiles lie on the CPU, `sums` on the device."""
        kind = torch.float32 if dtype is np.float32 else torch.float64
        size = shape[0] * shape[1]
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers.pop(name, None)
            device = self.device if name == "sums" else "cpu"
            self._buffers[name] = torch.empty(size, dtype=kind, device=device)
        return self._buffers[name][:size].view(shape)

    def _width(self, which: int, points: np.ndarray, other: int, others: np.ndarray, dtype: type) -> np.ndarray:
        """What the upper bound has above the lower one, for points and others of shapes that broadcast."""
        squares = self.squares[which][points] + self.squares[other][others]
        return 2 * self._beta(dtype) * squares + 4 * self._floor(dtype)

    def _beta(self, dtype: type) -> float:
        return 2.02 * (self.dim + 10) * float(np.finfo(dtype).eps) / 2

    def _floor(self, dtype: type) -> float:
        """More than all that a product can lose to numbers too small for its dtype."""
        return 16 * (self.dim + 2) * float(np.finfo(dtype).tiny)


def _keep_largest(values: torch.Tensor, indices: torch.Tensor, block: torch.Tensor, first: int) -> None:
    """Updates the largest values (n, k) of each row, and their columns (n, k), by a block (n, m) whose first column is `first`.

    m is a multiple of _SEGMENT. A row's k largest lie in the k segments with the largest maxima, so that only those are
    looked into.
    """
    kept = values.shape[1]
    segments = block.view(len(block), -1, _SEGMENT)
    chosen = segments.amax(dim=2).topk(min(kept, segments.shape[1]), dim=1, sorted=False).indices
    step = max(1, (1 << 21) // (chosen.shape[1] * _SEGMENT))
    within = torch.arange(_SEGMENT, device=block.device)
    for start in range(0, len(block), step):
        part = slice(start, start + step)
        places = (chosen[part, :, None] * _SEGMENT + within).flatten(1)
        candidates = torch.cat([values[part], block[part].gather(1, places)], dim=1)
        values[part], best = candidates.topk(kept, dim=1)
        indices[part] = torch.cat([indices[part], places + first], dim=1).gather(1, best)


def _spans(count: int, side: int) -> list[range]:
    """range(count) in equal parts of at most `side`, rounded to whole segments."""
    parts = -(-count // max(_SEGMENT, side // _SEGMENT * _SEGMENT))
    step = -(-count // (parts * _SEGMENT)) * _SEGMENT
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)


def _groups(rows: np.ndarray, columns: int) -> list[np.ndarray]:
    """`rows` in parts, so that a part has about a million entries of `columns` a row."""
    step = max(1, _MILLION // columns)
    return [rows[start : start + step] for start in range(0, len(rows), step)]
