"""Distances between sets of images: Fréchet distance, Inception Score, precision, recall and kernel distance of features.

    statistics = RunningStatistics(2048)                      # or one a process, joined by merge()
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

from evaluations.neighbours import Float16, Float64, points_inside

_ROWS = 1024  # rows handled at once where a block is not sized by a limit


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

    def __init__(self, dim: int):
        self._count, self._mean, self._scatter = 0, np.zeros(dim), np.zeros((dim, dim))
        # Small batches wait: adding to the D x D sums costs as much as the products of some hundred rows.
        self._waiting: list[np.ndarray] = []

    @property
    def count(self) -> int:
        """Samples seen so far."""
        return self._count + sum(map(len, self._waiting))

    def update(self, features: np.ndarray) -> None:
        """Add a batch (B, D). Raises ValueError for features that are not finite (says which)."""
        self._waiting.append(np.asarray(_finite(features, f"features (row 0 is sample {self.count})"), np.float64))
        if sum(map(len, self._waiting)) >= _ROWS:
            self._flush()

    def merge(self, other: "RunningStatistics") -> None:
        """Add all that `other`, of the same D, has seen."""
        self._flush()
        other._flush()
        self._add(other._count, other._mean, other._scatter)

    def result(self) -> Statistics:
        """Return the statistics of all samples seen so far. Raises ValueError for fewer than two."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        self._flush()
        return Statistics(self._mean.copy(), self._scatter / (self._count - 1), self._count)

    def _flush(self) -> None:
        if self.count > self._count:
            rows = np.concatenate(self._waiting)
            self._waiting = []
            mean = rows.mean(axis=0)
            rows -= mean
            self._add(len(rows), mean, rows.T @ rows)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not count:
            return
        difference, total = mean - self._mean, self._count + count
        self._scatter += scatter + np.outer(difference, difference) * (self._count / total * count)
        self._mean += difference * (count / total)
        self._count = total


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½), the Fréchet distance of two Gaussians (Heusel et al., 1706.08500).

    Published evaluators take the root of the product by scipy.linalg.sqrtm. Its trace is the sum of the roots of the eigenvalues of
    A^T S2 A for any A A^T = S1, which is all that is needed. Nothing is added to the diagonals: with fewer samples than
    dimensions the recorded figure of the published evaluator is the one without its 1e-6.

    Raises ValueError for features of different sizes.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} numbers a feature cannot be compared")
    # Cholesky with pivots stops at the rank: covariances of few samples are singular.
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(a.covariance, lower=1)
    factor = np.zeros((len(packed), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    roots = np.sqrt(np.maximum(scipy.linalg.eigvalsh(factor.T @ b.covariance @ factor), 0)).sum() if factor.size else 0
    difference = a.mean - b.mean
    return max(float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots), 0.0)


def inception_score(pool: np.ndarray, weights: np.ndarray, split_size: int = 5000) -> float:
    """Return exp(mean KL(p(y|x) || p(y))), with p(y) the mean over a split, and of that the mean over consecutive splits.

    pool: (N, D) features, weights: (D, C) of the last layer, so that p(y|x) = softmax(x weights) (no bias, as the
    published evaluators do). The last split may be shorter and counts as much as the others. Logits are float32, sums
    float64, and only the probabilities of some hundred images are in memory at a time. Salimans et al., 1606.03498.
    """
    pool, weights = _finite(pool, "features"), np.asarray(weights, np.float32)
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
    """Return KID: mean and standard deviation, over random subsets, of the unbiased squared MMD with (x·y / D + 1)³.

    a, b: (N, D) and (M, D). Bińkowski et al., 1801.01401. `subset_size` points of each are drawn without replacement, from
    a generator that `seed` fixes.
    """
    a, b = _finite(a, "the first features"), _finite(b, "the second features")
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
    memory: int = 256 << 20,
    progress: bool = False,
    float16: bool = False,
) -> tuple[float, float]:
    """Return precision and recall by nearest neighbours (Kynkäänniemi et al., 1904.06991).

    Around each point lies a ball that reaches to its `neighbours`-th nearest other point of its own set. Precision is the
    share of samples in at least one ball of the reference, recall the converse; the rim belongs to a ball.

    Args:
        reference: (N, D), and samples: (M, D); features may be memory-mapped.
        device: where the distances are computed.
        memory: bytes of distances held at once.
        float16: distances as published evaluators round them, for comparing with their figures. With 11 bits, which neighbour is
            third and who is in a ball depend on rounding; with few images that moves the figures by some hundredths.

    Raises:
        ValueError: fewer than neighbours + 1 points, or features that are not finite (says which rows).
    """
    reference, samples = _finite(reference, "reference features"), _finite(samples, "sample features")
    if min(len(reference), len(samples)) <= neighbours:
        counts = f"{len(reference)} reference and {len(samples)} sample features"
        raise ValueError(f"{counts}: {neighbours} neighbours need at least {neighbours + 1} of each")
    n, m = len(reference), len(samples)
    with tqdm(total=n * n + m * m + n * m, unit=" distances", unit_scale=True, disable=not progress) as bar:
        arithmetic = Float16 if float16 else Float64
        inside = points_inside((reference, samples), neighbours, torch.device(device), memory, bar, arithmetic)
    return float(inside[1].mean()), float(inside[0].mean())


def _finite(features: np.ndarray, name: str) -> np.ndarray:
    """Return features (N, D). Raises ValueError that says which rows have a NaN or an infinity."""
    features = np.asarray(features)
    parts = (features[start : start + _ROWS] for start in range(0, len(features), _ROWS))
    wrong = np.flatnonzero(np.concatenate([~np.isfinite(part).all(axis=1) for part in parts] or [[]]))
    if len(wrong):
        more = f", … ({len(wrong)} in all)" if len(wrong) > 10 else ""
        raise ValueError(
            f"{name} of {len(features)} rows are not finite in rows {', '.join(map(str, wrong[:10]))}{more}"
        )
    return features
