"""How near a set of images is to another: Fréchet distance, Inception Score, precision, recall and kernel distance of features.

    statistics = RunningStatistics(2048)                      # or one a process, gathered by state() and merge()
    for features in batches:                                  # (B, 2048)
        statistics.update(features)
    fid = frechet_distance(reference, statistics.result())
    precision, recall = precision_recall(reference_features, sample_features)

Features are arrays of one row an image. Where they come from is not asked here: evaluations/c2i has the Inception graph,
evaluations/dinov2.py another network.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from evaluations.neighbours import exact_inside, float16_inside

MEBIBYTE = 1 << 20
_ROWS = 1024  # rows handled at once where a block is not sized by a limit
_LISTED = 10  # rows that a message names
_ROUNDINGS, _TOLERANCE = 64, 1e-5  # of eigenvalues, in units of the largest's; of a distance, relative


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of one set of features.

    mean: (D,) float64. covariance: (D, D) float64, unbiased, as np.cov gives it. count: samples seen, None where a file
    does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None


class RunningStatistics:
    """Mean and covariance in one pass over batches, in float64, in one process or in many.

    Batches are combined by the pairwise update of Chan, Golub and LeVeque (1979): every batch is centred on its own mean,
    so features far from zero lose nothing, and the batches' sizes and order change the result by rounding only.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        """dim: D, numbers a feature. device: where the sums are kept and added up (mps has no float64: the CPU is used)."""
        if dim < 1:
            raise ValueError(f"features of {dim} numbers: dim must be above 0")
        device = torch.device(device)
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.dim = dim
        self._count = 0  # of the samples in the sums; those in the buffer come later
        self._mean = torch.zeros(dim, dtype=torch.float64, device=self.device)
        # On the CPU only the triangle that BLAS writes is valid.
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)
        # Small batches are collected: adding to the D x D sums costs as much as the products of some hundred rows. The
        # last row is for what combining two means adds to the scatter.
        self._buffer = torch.empty(_ROWS + 1, dim, dtype=torch.float64, device=self.device)
        self._filled = 0

    @property
    def count(self) -> int:
        """Samples seen so far."""
        return self._count + self._filled

    def update(self, features: np.ndarray | torch.Tensor) -> None:
        """Adds a batch, (B, D) of any real dtype.

        Raises ValueError for another shape and for features that are not finite (says which rows); nothing of such a
        batch is added.
        """
        if isinstance(features, torch.Tensor):
            features = features.detach()
            if self.device.type == "cpu":
                features = (features.double() if features.dtype == torch.bfloat16 else features).cpu().numpy()
        else:
            features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features of shape {tuple(features.shape)}, expected (batch, {self.dim})")
        _require_finite(features, f"features (row 0 is sample {self.count})")
        start = 0
        while start < len(features):
            taken = min(len(features) - start, _ROWS - self._filled)
            part = features[start : start + taken]
            if isinstance(part, np.ndarray) and self.device.type == "cpu":
                self._buffer.numpy()[self._filled : self._filled + taken] = part
            else:
                part = torch.from_numpy(part.astype(np.float64)) if isinstance(part, np.ndarray) else part
                self._buffer[self._filled : self._filled + taken] = part.to(self.device, torch.float64)
            self._filled += taken
            start += taken
            if self._filled == _ROWS:
                self._flush()

    def merge(self, other: "RunningStatistics") -> None:
        """Adds all that `other`, of the same D, has seen. Raises ValueError where D differs."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {other.dim} numbers a feature cannot be added to those of {self.dim}")
        self._flush()
        other._flush()
        if other._count:
            self._scatter += other._scatter.to(self.device)
            difference = self._take(other._count, other._mean.to(self.device))
            self._add_products(difference[None])

    def state(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(count, mean (D,), sum of products of deviations (D, D)), to be sent to another process or written."""
        self._flush()
        return self._count, self._mean.cpu().numpy().copy(), _mirrored(self._scatter.cpu().numpy())

    @classmethod
    def from_state(
        cls, state: tuple[int, np.ndarray, np.ndarray], device: torch.device | str = "cpu"
    ) -> "RunningStatistics":
        """What `state` described, to go on with or to merge."""
        count, mean, scatter = state
        statistics = cls(len(mean), device)
        statistics._count = int(count)
        statistics._mean.copy_(torch.from_numpy(np.array(mean)))
        statistics._scatter.copy_(torch.from_numpy(np.array(scatter)))
        return statistics

    def result(self) -> Statistics:
        """The statistics of all samples seen so far. Raises ValueError for fewer than two."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        count, mean, scatter = self.state()
        return Statistics(mean, scatter / (count - 1), count)

    def _flush(self) -> None:
        """Empties the buffer into the sums."""
        if not self._filled:
            return
        rows = self._buffer[: self._filled]
        mean = rows.mean(dim=0)
        rows -= mean
        self._buffer[self._filled] = self._take(self._filled, mean)
        self._add_products(self._buffer[: self._filled + 1])
        self._filled = 0

    def _take(self, count: int, mean: torch.Tensor) -> torch.Tensor:
        """Joins `count` samples of this mean to the mean. The returned (D,) is the row whose products with itself the
        scatter gains by that."""
        difference = mean - self._mean
        total = self._count + count
        self._mean += difference * (count / total)
        row = difference * math.sqrt(self._count / total * count)
        self._count = total
        return row

    def _add_products(self, rows: torch.Tensor) -> None:
        """scatter += rows^T rows. rows: (n, D)."""
        if self.device.type == "cpu":
            # Half the work of a general product, and in place.
            scatter = self._scatter.numpy().T
            written = scipy.linalg.blas.dsyrk(1.0, rows.numpy().T, beta=1.0, c=scatter, lower=0, overwrite_c=1)
            if not np.shares_memory(written, scatter):
                scatter[...] = written
        else:
            self._scatter.addmm_(rows.T, rows)


def _mirrored(matrix: np.ndarray) -> np.ndarray:
    """The symmetric matrix whose lower triangle this is; a full one stays as it is."""
    lower = np.tril(matrix)
    lower += np.tril(matrix, -1).T
    return lower


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½): the Fréchet distance of two Gaussians (Heusel et al., 1706.08500).

    Published evaluators take the root of the product with scipy.linalg.sqrtm, and add 1e-6 to both diagonals only where
    that root has entries that are not finite. With fewer samples than dimensions the product is singular, yet its computed
    root is finite, and the figure recorded from the published evaluator is the one without 1e-6: 0.99033 for 160 and 140
    samples of 2048 numbers, where 1e-6 would give 0.98563. So nothing is ever added here. Only the trace of the root is
    needed: the sum of the roots of the eigenvalues of A^T S2 A for any A A^T = S1, here a Cholesky factor that is cut off at
    the rank. Where rounding of the smallest could show, it is the sum of the singular values of A^T B with B B^T = S2, slower
    and exact. Differs from sqrtm by the latter's rounding, 1e-5 relative in that singular case.

    Raises ValueError for means or covariances of different sizes or with entries that are not finite.
    """
    for name, s in (("first", a), ("second", b)):
        dim = len(s.mean)
        if s.mean.shape != (dim,) or s.covariance.shape != (dim, dim):
            raise ValueError(f"the {name} statistics have a mean {s.mean.shape} and a covariance {s.covariance.shape}")
        if not (np.isfinite(s.mean).all() and np.isfinite(s.covariance).all()):
            raise ValueError(f"the {name} statistics have entries that are not finite")
        if s.covariance.diagonal().min() < 0:
            raise ValueError(f"the {name} statistics have a negative variance ({s.covariance.diagonal().min():.3g})")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} numbers a feature cannot be compared")
    covariances = [_symmetric(s.covariance) for s in (a, b)]
    difference = np.asarray(a.mean, np.float64) - b.mean
    apart = difference @ difference + np.trace(covariances[0]) + np.trace(covariances[1])
    factor = _factor(covariances[0])
    if not factor.size:
        return float(apart)
    values = scipy.linalg.eigvalsh(factor.T @ covariances[1] @ factor)
    distance = apart - 2 * np.sqrt(np.maximum(values, 0)).sum()
    # An eigenvalue is off by some roundings of the largest, and its root by more the smaller it is. None is negative: where
    # the least one seems to be, it shows how large rounding is among the small ones, mostly far less than that bound.
    off = min(_ROUNDINGS * np.finfo(np.float64).eps * values[-1], 8 * abs(values[0]) or math.inf)
    if off and not 2 * (off / np.sqrt(np.maximum(values, off))).sum() < _TOLERANCE * distance:
        distance = apart - 2 * scipy.linalg.svdvals(factor.T @ _factor(covariances[1])).sum()
    return max(float(distance), 0.0)


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    return (matrix + matrix.T) / 2


def _factor(covariance: np.ndarray) -> np.ndarray:
    """R (D, rank) with R R^T = covariance."""
    dim = len(covariance)
    # Of correlations rather than covariances, so that coordinates of small scale are not taken for rounding.
    deviations = np.sqrt(covariance.diagonal())
    deviations[deviations == 0] = 1
    correlations = covariance / deviations[:, None] / deviations
    try:
        return np.linalg.cholesky(correlations) * deviations[:, None]
    except np.linalg.LinAlgError:
        pass
    tolerance = dim * np.finfo(np.float64).eps
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(correlations, tol=tolerance, lower=1)
    factor = np.zeros((dim, rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    if np.abs(factor @ factor.T - correlations).max() > 1e-10:
        # Negative eigenvalues beyond rounding, as in covariances stored in float32: cut off, which pivoting cannot.
        eigenvalues, vectors = scipy.linalg.eigh(correlations)
        kept = eigenvalues > tolerance * eigenvalues[-1]
        factor = vectors[:, kept] * np.sqrt(eigenvalues[kept])
    return factor * deviations[:, None]


def inception_score(pool: np.ndarray, weights: np.ndarray, split_size: int = 5000) -> float:
    """exp(mean KL(p(y|x) || p(y))), with p(y) the mean over a split, and the mean of that over consecutive splits.

    pool: (N, D) features, weights: (D, C) of the last layer, so that p(y|x) = softmax(x weights) (no bias, as the
    published evaluators do). The last split may be shorter and counts as much as the others. Logits are float32, sums
    float64, and only the probabilities of some hundred images are in memory at a time. Salimans et al., 1606.03498.

    Raises ValueError for shapes that do not fit, no features, or features that are not finite.
    """
    pool, weights = np.asarray(pool), np.asarray(weights, np.float32)
    if pool.ndim != 2 or weights.ndim != 2 or pool.shape[1] != weights.shape[0]:
        raise ValueError(f"features {pool.shape} do not go with weights {weights.shape}: expected (N, D) and (D, C)")
    if not len(pool) or split_size < 1:
        raise ValueError(f"{len(pool)} features in splits of {split_size}: both must be above 0")
    _require_finite(pool, "features")
    _require_finite(weights, "weights")
    scores = []
    for first in range(0, len(pool), split_size):
        split = pool[first : first + split_size]
        total, negative_entropy = np.zeros(weights.shape[1]), 0.0
        for start in range(0, len(split), _ROWS):
            logits = np.asarray(split[start : start + _ROWS], np.float32) @ weights
            logs = torch.log_softmax(torch.from_numpy(logits).double(), dim=1)
            probabilities = logs.exp()
            total += probabilities.sum(dim=0).numpy()
            # A probability that underflows to 0 has a finite logarithm here and adds nothing.
            negative_entropy += float((probabilities * logs).sum())
        mean = total / len(split)
        # The mean of sum p (log p - log mean) over the images, with the second part taken out of the mean.
        mean_log = np.log(mean, where=mean > 0, out=np.zeros_like(mean))
        scores.append(math.exp(negative_entropy / len(split) - float(mean @ mean_log)))
    return float(np.mean(scores))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: mean and standard deviation, over random subsets, of the unbiased squared MMD with (x·y / D + 1)³.

    a, b: (N, D) and (M, D). Bińkowski et al., 1801.01401. `subset_size` points of each are drawn without replacement, from
    a generator that `seed` fixes. Raises ValueError for other shapes, features that are not finite, or a subset that is
    smaller than 2 or larger than a set.
    """
    a, b = _features(a, "the first features"), _features(b, "the second features")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} numbers cannot be compared")
    if subsets < 1 or not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"{subsets} subsets of {subset_size} from {len(a)} and {len(b)} features: subsets must be above 0, "
            f"subset_size between 2 and {min(len(a), len(b))}"
        )
    generator = np.random.default_rng(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        x, y = (
            np.asarray(features[generator.choice(len(features), subset_size, replace=False)], np.float64)
            for features in (a, b)
        )
        pairs = subset_size * (subset_size - 1)
        within = sum(_kernel_sum(z, z) - float((((z * z).sum(axis=1) / z.shape[1] + 1) ** 3).sum()) for z in (x, y))
        values[i] = within / pairs - 2 * _kernel_sum(x, y) / subset_size**2
    return float(values.mean()), float(values.std())


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    kernel = x @ y.T
    kernel /= x.shape[1]
    kernel += 1
    return float(np.einsum("ij,ij,ij->", kernel, kernel, kernel))


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    *,
    neighbours: int = 3,
    device: torch.device | str = "cpu",
    memory: int = 256 * MEBIBYTE,
    progress: bool = False,
    float16: bool = False,
) -> tuple[float, float]:
    """Precision and recall by nearest neighbours (Kynkäänniemi et al., 1904.06991).

    reference (N, D), samples (M, D). Around each point lies a ball that reaches to its `neighbours`-th nearest other point
    of its own set. Precision is the share of samples in at least one ball of the reference, recall the converse; the
    rim belongs to a ball.

    Exact: the result is that of distances by differences in float64. Nearly all are decided from float32 products of
    centred features, whose rounding has a proven bound; the few that the bound leaves open are computed by differences.

    float16: instead, distances as published evaluators take them: |x|² - 2 x·y + |y|², every step in float16 as TensorFlow
    rounds it on a processor, in float32 where a block of them overflows. With 11 bits, which neighbour is third and who is in
    a ball depend on rounding; with few images that moves the figures by some hundredths. It is for comparing with figures
    computed like that.

    device: where the products are made. memory: bytes of distances held at once, to which two tiles of
    sqrt(memory / 4) features come, never a whole set; features may be memory-mapped. progress: show a bar.
    Sets of many points at equal distances, or of clusters far tighter than their distance, take longer, not more memory.

    Raises ValueError for fewer than neighbours + 1 points, features of different sizes or not finite (says which rows).
    """
    reference, samples = _features(reference, "reference features"), _features(samples, "sample features")
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(f"reference features have {reference.shape[1]} numbers, sample features {samples.shape[1]}")
    if neighbours < 1:
        raise ValueError(f"neighbours must be above 0, got {neighbours}")
    for name, features in (("reference", reference), ("sample", samples)):
        if len(features) <= neighbours:
            raise ValueError(f"{len(features)} {name} features: {neighbours} neighbours need at least {neighbours + 1}")
    if memory < MEBIBYTE:
        raise ValueError(f"memory of {memory} bytes: give at least {MEBIBYTE}")
    sizes = [len(reference), len(samples)]
    pairs = sum(n * n for n in sizes) if float16 else sum(n * (n - 1) // 2 for n in sizes)
    find = float16_inside if float16 else exact_inside
    with tqdm(total=pairs + sizes[0] * sizes[1], unit=" distances", unit_scale=True, disable=not progress) as bar:
        inside = find((reference, samples), neighbours, torch.device(device), memory, bar)
    return float(inside[1].mean()), float(inside[0].mean())


def _features(features: np.ndarray, name: str) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or not features.shape[1]:
        raise ValueError(f"{name} are of shape {features.shape}, expected (images, numbers)")
    _require_finite(features, name)
    return features


def _require_finite(features: np.ndarray | torch.Tensor, name: str) -> None:
    """Raises ValueError that says which rows of a (N, D) have a NaN or an infinity."""
    if not isinstance(features, torch.Tensor) and features.dtype.kind not in "fiub":
        raise ValueError(f"{name} are {features.dtype}, expected real numbers")
    wrong: list[int] = []
    for start in range(0, len(features), _ROWS):
        block = features[start : start + _ROWS]
        if isinstance(block, torch.Tensor):
            finite = block.isfinite().all(dim=1).cpu().numpy()
        else:
            finite = np.isfinite(block).all(axis=1)
        wrong += (start + np.flatnonzero(~finite)).tolist()
    if wrong:
        rows = ", ".join(map(str, wrong[:_LISTED])) + (f", ... ({len(wrong)} in all)" if len(wrong) > _LISTED else "")
        raise ValueError(
            f"{name} of {len(features)} rows are not finite in {'rows' if len(wrong) > 1 else 'row'} {rows}"
        )
