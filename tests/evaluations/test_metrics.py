"""The figures of an evaluation, each against a second way written here and against what the published evaluator gave."""

import json
import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluations import neighbours
from evaluations.metrics import (
    RunningStatistics,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from tests.helpers import GOLDEN

FOLDER = GOLDEN / "evaluator"


def expected() -> dict:
    return json.loads((FOLDER / "expected.json").read_text())


def recorded_features() -> tuple[np.ndarray, np.ndarray]:
    with np.load(FOLDER / "features.npz") as data:
        return data["reference"], data["sample"]


def statistics(features: np.ndarray) -> Statistics:
    running = RunningStatistics(features.shape[1])
    running.update(features)
    return running.result()


def published_distance(a: np.ndarray, b: np.ndarray) -> float:
    """np.cov over everything and the root of the product, as published evaluators take it."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second)
    assert np.isfinite(root).all()
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + np.trace(first) + np.trace(second) - 2 * np.trace(root.real)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ((a.astype(np.float64)[:, None] - b.astype(np.float64)[None]) ** 2).sum(-1)


def brute_precision_recall(reference: np.ndarray, samples: np.ndarray, neighbours: int) -> tuple[float, float]:
    def squared_radii(points):
        distances = squared_distances(points, points)
        np.fill_diagonal(distances, np.inf)
        return np.sort(distances, axis=1)[:, neighbours - 1]

    distances = squared_distances(samples, reference)
    precision = (distances <= squared_radii(reference)[None]).any(axis=1).mean()
    recall = (distances <= squared_radii(samples)[:, None]).any(axis=0).mean()
    return float(precision), float(recall)


# Recorded figures


def test_figures_recorded_from_the_published_evaluator():
    reference, samples = recorded_features()
    recorded = expected()["features"]
    assert frechet_distance(statistics(reference), statistics(samples)) == pytest.approx(recorded["fid"], rel=1e-6)
    got = precision_recall(reference, samples)
    assert got == pytest.approx((recorded["precision"], recorded["recall"]), abs=1e-9)


# Mean and covariance


def test_one_pass_gives_numpys_mean_and_covariance():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(2500, 7)).astype(np.float32)
    running = RunningStatistics(7)
    for part in np.split(features, [1, 2, 40, 1500, 1500]):  # batches of 1, of none, and of more than the buffer
        running.update(part)
    got = running.result()
    assert got.count == running.count == 2500
    assert got.mean.dtype == got.covariance.dtype == np.float64
    np.testing.assert_allclose(got.mean, features.mean(0, dtype=np.float64), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        got.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("batch", [1, 700])
def test_a_large_mean_takes_nothing_from_a_small_spread(batch):
    features = 1e4 + 1e-2 * np.random.default_rng(0).normal(size=(3000, 5))
    running = RunningStatistics(5)
    for start in range(0, 3000, batch):
        running.update(features[start : start + batch])
    np.testing.assert_allclose(running.result().covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-13)


def test_processes_merge_to_what_one_would_have_seen():
    features = np.random.default_rng(0).normal(size=(3001, 6)) + 50
    parts = []
    for rank in range(4):
        running = RunningStatistics(6)
        running.update(features[rank * 2 : rank * 2 + 2] if rank == 3 else features[100 + rank :: 3])
        parts.append(pickle.loads(pickle.dumps(running)))
    merged = RunningStatistics(6)
    for part in parts:
        merged.merge(part)
    seen = np.concatenate([features[100::3], features[101::3], features[102::3], features[6:8]])
    got = merged.result()
    assert got.count == len(seen)
    np.testing.assert_allclose(got.mean, seen.mean(0), rtol=1e-13)
    np.testing.assert_allclose(got.covariance, np.cov(seen, rowvar=False), rtol=1e-11)
    merged.update(features[:10])  # and goes on
    assert merged.count == len(seen) + 10
    merged.merge(RunningStatistics(6))
    np.testing.assert_allclose(merged.result().covariance, np.cov(np.r_[seen, features[:10]], rowvar=False), rtol=1e-11)


def test_features_that_cannot_be_added_leave_the_sums_as_they_were():
    running = RunningStatistics(3)
    good = np.random.default_rng(0).normal(size=(1500, 3))
    running.update(good)
    bad = good.copy()
    bad[[7, 1400], [0, 2]] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"row 0 is sample 1500\) of 1500 rows are not finite in rows 7, 1400"):
        running.update(bad)
    np.testing.assert_allclose(running.result().covariance, np.cov(good, rowvar=False), rtol=1e-12)
    one = RunningStatistics(3)
    one.update(good[:1])
    with pytest.raises(ValueError, match=r"at least 2 samples, got 1"):
        one.result()


# Fréchet distance


@pytest.mark.parametrize(
    "dim, sizes", [(40, (300, 200)), (40, (30, 200)), (40, (200, 30)), (40, (30, 20)), (1, (9, 5))]
)
def test_the_distance_is_that_of_the_root_of_the_product(dim, sizes):
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(dim, dim))
    a, b = (generator.normal(size=(n, dim)) @ mix + shift for n, shift in zip(sizes, (0, 0.5)))
    if dim == 1:
        difference = a.mean() - b.mean()
        by_hand = difference**2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    else:
        by_hand = published_distance(a, b)
    got = frechet_distance(statistics(a), statistics(b))
    assert got == pytest.approx(by_hand, rel=1e-6)
    assert frechet_distance(statistics(b), statistics(a)) == pytest.approx(got, rel=1e-6)


@pytest.mark.parametrize("sizes", [(900, 700), (60, 50)], ids=["full rank", "few samples"])
def test_the_distance_of_many_numbers(sizes):
    """With a decaying spectrum, as networks' features have; few samples make the product singular."""
    generator = np.random.default_rng(0)
    mix = scipy.linalg.qr(generator.normal(size=(300, 300)))[0] * np.geomspace(1, 1e-2, 300)[:, None]
    a, b = (np.maximum(generator.normal(size=(n, 300)) @ mix + 0.02 + s, 0) for n, s in zip(sizes, (0, 5e-3)))
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(published_distance(a, b), rel=1e-3)


def test_known_distances():
    features = np.random.default_rng(0).normal(size=(500, 6))
    own = statistics(features)
    assert frechet_distance(own, own) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(own, statistics(features + 3)) == pytest.approx(6 * 9, rel=1e-10)
    a, nothing = Statistics(np.ones(2), np.diag([4.0, 9.0])), Statistics(np.zeros(2), np.zeros((2, 2)))
    assert frechet_distance(nothing, a) == pytest.approx(2 + 13, rel=1e-12)


def test_covariances_rounded_to_float32():
    """Their smallest eigenvalues are negative, far beyond float64's rounding."""
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(300, 300)) * np.geomspace(1, 1e-6, 300)[:, None]
    a, b = (np.cov(generator.normal(size=(2000, 300)) @ mix, rowvar=False) for _ in range(2))
    mean = np.zeros(300)
    exact = frechet_distance(Statistics(mean, a), Statistics(mean, b))
    rounded = [Statistics(mean, c.astype(np.float32).astype(np.float64)) for c in (a, b)]
    assert np.linalg.eigvalsh(rounded[0].covariance).min() < 0
    assert frechet_distance(*rounded) == pytest.approx(exact, rel=1e-2)
    assert exact > 0


def test_statistics_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"of 2 and of 3 numbers"):
        frechet_distance(Statistics(np.zeros(2), np.eye(2)), Statistics(np.zeros(3), np.eye(3)))


# Inception Score


def test_the_score_of_splits_by_hand():
    generator = np.random.default_rng(0)
    pool, weights = generator.normal(size=(53, 6)), generator.normal(size=(6, 9))
    scores = []
    for split in (pool[:20], pool[20:40], pool[40:]):
        probabilities = [[math.exp(v) for v in row] for row in split @ weights]
        probabilities = [[v / sum(row) for v in row] for row in probabilities]
        mean = [sum(column) / len(split) for column in zip(*probabilities)]
        divergences = [sum(p * math.log(p / m) for p, m in zip(row, mean)) for row in probabilities]
        scores.append(math.exp(sum(divergences) / len(split)))
    assert inception_score(pool, weights, split_size=20) == pytest.approx(sum(scores) / 3, rel=1e-5)


def test_known_scores():
    classes = np.eye(8)
    # Sure of one of 8 classes, all alike often; probabilities that underflow add nothing.
    assert inception_score(np.tile(classes, (300, 1)), 1e4 * classes) == pytest.approx(8, rel=1e-9)
    assert inception_score(np.ones((100, 8)), classes) == pytest.approx(1, abs=1e-9)


# Precision and recall


def awkward_sets() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sets where rounding decides, or where distances tie."""
    generator = np.random.default_rng(0)
    n, m, dim = 130, 257, 48
    a, b = generator.normal(size=(n, dim)), generator.normal(size=(m, dim))
    few = generator.normal(size=(3, dim))
    return {
        "ordinary": (a.astype(np.float32), b.astype(np.float32)),
        "a lattice": (generator.integers(0, 3, (n, dim)).astype(np.float32), generator.integers(0, 3, (m, dim)) * 1.0),
        "copies": (a[generator.integers(0, n, n)], a[generator.integers(0, n, m)]),
        "the same": (a, a.copy()),
        "shared in part": (a, np.concatenate([a[:50], b[:60]])),
        "one point": (np.ones((n, dim)), np.ones((m, dim))),
        "tight clusters": (few[np.arange(n) % 3] + 1e-3 * a, few[np.arange(m) % 3] + 1e-3 * b),
        "clusters of copies": (few[np.arange(n) % 3], few[np.arange(m) % 3] + 1e-3 * (np.arange(m) % 4 == 0)[:, None]),
    }


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("kind", awkward_sets())
def test_precision_and_recall_are_exact(kind, neighbours):
    reference, samples = awkward_sets()[kind]
    got = precision_recall(reference, samples, neighbours=neighbours, memory=1 << 20)
    assert got == brute_precision_recall(reference, samples, neighbours)


def test_tiles_and_what_a_process_allows_change_nothing():
    """Many tiles, some of them ragged; bfloat16 products allowed outside."""
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(601, 24)).astype(np.float32)
    samples = generator.normal(size=(377, 24)).astype(np.float32)
    expected = brute_precision_recall(reference, samples, 3)
    assert 0.1 < expected[0] < 0.9 and 0.1 < expected[1] < 0.9
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert precision_recall(reference, samples) == precision_recall(reference, samples, memory=1 << 20) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_float16_distances_of_the_published_evaluator():
    reference, samples = recorded_features()
    recorded = expected()["features"]
    got = precision_recall(reference, samples, float16=True)
    assert got == pytest.approx((recorded["precision"], recorded["recall"]), abs=0.01)

    # Small whole numbers are exact in float16, tiles or not.
    generator = np.random.default_rng(0)
    whole, others = generator.integers(0, 6, (600, 3)), generator.integers(1, 7, (450, 3))
    exact = brute_precision_recall(whole, others, 3)
    assert precision_recall(whole, others, float16=True, memory=1 << 20) == exact
    # A squared norm above 65504 overflows: the block is taken in float32, which has whole numbers of that size.
    whole, others = whole * 100, others * 100
    assert precision_recall(whole, others, float16=True, memory=1 << 20) == exact

    # 40² is 1600, where float16 counts in ones: what is nearer than that is at distance 0.
    line = 40 + 1e-3 * np.arange(20, dtype=np.float32)[:, None]
    assert precision_recall(line, line + 0.5) == (0, 0)
    assert precision_recall(line, line + 0.5, float16=True) == (1, 1)


@pytest.mark.slow
def test_float16_distances_are_tensorflows(monkeypatch):
    """Sums of squares to the last bit; distances but for a product in a thousand, added up in another order."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    from evaluations.c2i.inception import import_tensorflow

    tf = import_tensorflow()

    rng = np.random.default_rng(0)
    for dim in (1, 7, 8, 24, 48, 72, 448, 1000, 1600, 1608, 2048, 4104):
        x, y = (np.maximum(rng.normal(0.2, 0.3, (40, dim)), 0).astype(np.float16) for _ in range(2))
        squares = [tf.reduce_sum(tf.constant(z) * tf.constant(z), axis=1) for z in (x, y)]
        ours = [neighbours._sums(torch.from_numpy(z) ** 2).numpy() for z in (x, y)]
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(squares, ours)), dim
        theirs = tf.maximum(squares[0][:, None] - 2 * tf.matmul(x, y, transpose_b=True) + squares[1], 0).numpy()
        half = neighbours.Float16((x, y), torch.device("cpu"))
        got = half.between(half.points(0, slice(None)), half.points(1, slice(None))).numpy()
        assert np.mean(got == theirs.astype(np.float32)) > 0.998, dim


@pytest.mark.gpu
def test_an_accelerator_gives_the_same_figures():
    device = "cuda" if torch.cuda.is_available() else "mps"
    for kind, (reference, samples) in awkward_sets().items():
        got = precision_recall(reference, samples, device=device, memory=1 << 20)
        assert got == brute_precision_recall(reference, samples, 3), kind


def test_sets_that_have_no_precision():
    good = np.random.default_rng(0).normal(size=(20, 3))
    bad = good.copy()
    bad[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"3 reference and 20 sample features: 3 neighbours need at least 4"):
        precision_recall(good[:3], good)
    with pytest.raises(ValueError, match=r"sample features of 20 rows are not finite in rows 4"):
        precision_recall(good, bad)


# Kernel distance


def test_the_kernel_distance_by_hand():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(30, 4)), generator.normal(size=(25, 4)) + 0.5
    draws = np.random.default_rng(7)
    values = []
    for _ in range(3):
        x, y = a[draws.choice(30, 12, replace=False)], b[draws.choice(25, 12, replace=False)]

        def kernel(p, q):
            return (sum(p * q) / 4 + 1) ** 3

        within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(12) for j in range(12) if i != j) / (12 * 11)
        values.append(within - 2 * sum(kernel(p, q) for p in x for q in y) / 144)
    got = kernel_distance(a, b, subsets=3, subset_size=12, seed=7)
    assert got == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)
    assert kernel_distance(a, b, subsets=3, subset_size=12, seed=8) != got


def test_the_kernel_distance_of_one_distribution_is_about_nothing():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 2000, 16))
    mean, deviation = kernel_distance(a, b, subsets=40, subset_size=200)
    assert abs(mean) < deviation < 0.05
    assert kernel_distance(a, b + 0.5, subsets=5, subset_size=200)[0] > 10 * deviation
