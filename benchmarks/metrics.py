"""How fast a comparison of features is: this project's metrics against the published method, in one run.

    python3 benchmarks/metrics.py --references 2000 --samples 5000
    python3 benchmarks/metrics.py --references 10000 --samples 50000 --only memory

The published method: np.cov over all features, the root of the product of covariances by scipy.linalg.sqrtm, and distances
by blocks in TensorFlow's float16. Its line in float32 is what those would cost if every block overflowed. Features are
random, of the kind that networks end in: rectified, and of fewer directions than numbers. `memory` is the peak of
precision and recall above what the process held before, with the features mapped from files.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    import numpy as np

PARTS = ("statistics", "distance", "neighbours", "memory")


def main(args: argparse.Namespace) -> None:
    clock = time.perf_counter
    if args.device == "cpu":
        # One core, whose processor time other work on the machine does not lengthen. Libraries read this when imported.
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")
        clock = time.process_time

    import numpy as np

    from utils.distributed import pick_device

    device = pick_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sets = []
        for name, count in (("reference", args.references), ("samples", args.samples)):
            path = Path(folder) / f"{name}.npy"
            write_features(path, count, args.dim, seed=len(sets))
            sets.append(np.load(path, mmap_mode="r"))
        machine = "one core" if device.type == "cpu" else device.type
        print(f"{args.references} and {args.samples} features of {args.dim}, {machine}, best of {args.runs}")
        if "memory" in args.only:
            measure_memory(sets[0], sets[1], device)
        print(f"{'':12}{'published, s':>14}{'this, s':>10}{'ratio':>8}")
        total = [0.0, 0.0]
        for part in args.only:
            if part == "memory":
                continue
            ways = {"statistics": statistics_ways, "distance": distance_ways, "neighbours": neighbours_ways}[part](
                sets[0], sets[1], device, args.float32
            )
            seconds = [float("inf"), float("inf")]
            for _ in range(args.runs):  # in turn, so that another job on the machine slows both alike
                for i, way in enumerate(ways):
                    begin = clock()
                    way()
                    seconds[i] = min(seconds[i], clock() - begin)
            total = [t + s for t, s in zip(total, seconds)]
            print(f"{part:12}{seconds[0]:14.2f}{seconds[1]:10.2f}{seconds[0] / seconds[1]:8.2f}", flush=True)
        if total[1]:
            print(f"{'together':12}{total[0]:14.2f}{total[1]:10.2f}{total[0] / total[1]:8.2f}")


def write_features(path: Path, count: int, dim: int, seed: int) -> None:
    """Writes float32 (count, dim): rectified mixtures of 64 directions, with noise."""
    import numpy as np

    mix = np.random.default_rng(0).standard_normal((64, dim), np.float32)
    generator = np.random.default_rng(seed + 1)
    features = np.lib.format.open_memmap(path, "w+", np.float32, (count, dim))
    for start in range(0, count, 1000):
        n = min(1000, count - start)
        block = generator.standard_normal((n, 64), np.float32) @ mix / 10
        block += generator.standard_normal((n, dim), np.float32) / 5 + (0.1 + seed / 100)
        features[start : start + n] = np.maximum(block, 0)
    features.flush()


Ways = tuple[Callable[[], object], Callable[[], object]]


def statistics_ways(reference: "np.ndarray", samples: "np.ndarray", device: object, float32: bool) -> Ways:
    """Mean and covariance of both sets: np.cov at once, and a pass over batches of 64."""
    import numpy as np

    from evaluations.metrics import RunningStatistics

    def stream() -> None:
        for features in (reference, samples):
            running = RunningStatistics(features.shape[1], device)
            for start in range(0, len(features), 64):
                running.update(features[start : start + 64])
            running.result()

    return lambda: [(np.mean(f, axis=0), np.cov(f, rowvar=False)) for f in (reference, samples)], stream


def distance_ways(reference: "np.ndarray", samples: "np.ndarray", device: object, float32: bool) -> Ways:
    """The Fréchet distance from statistics."""
    import numpy as np
    import scipy.linalg

    from evaluations.metrics import Statistics, frechet_distance

    a, b = (Statistics(np.mean(f, axis=0), np.cov(f, rowvar=False), len(f)) for f in (reference, samples))
    return lambda: scipy.linalg.sqrtm(a.covariance @ b.covariance).real.trace(), lambda: frechet_distance(a, b)


def neighbours_ways(reference: "np.ndarray", samples: "np.ndarray", device: object, float32: bool) -> Ways:
    """Precision and recall."""
    from evaluations.metrics import precision_recall

    return (
        lambda: published_neighbours(reference, samples, float32),
        lambda: precision_recall(reference, samples, device=device),
    )


def published_neighbours(
    reference: "np.ndarray", samples: "np.ndarray", float32: bool, block: int = 10_000
) -> tuple[float, float]:
    """Precision and recall with whole rows of distances, a partition for the third neighbour, and all comparisons."""
    import numpy as np

    from evaluations.c2i.inception import import_tensorflow

    tf = import_tensorflow()

    kind = tf.float32 if float32 else tf.float16

    def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = tf.cast(tf.constant(x), kind), tf.cast(tf.constant(y), kind)
        x_squares, y_squares = tf.reduce_sum(x * x, axis=1), tf.reduce_sum(y * y, axis=1)
        found = x_squares[:, None] - 2 * tf.matmul(x, y, transpose_b=True) + y_squares[None]
        return tf.cast(tf.maximum(found, 0), tf.float32).numpy()

    def blocks(features: np.ndarray) -> list[slice]:
        return [slice(start, start + block) for start in range(0, len(features), block)]

    radii = []
    for features in (reference, samples):
        found = []
        for rows in blocks(features):
            whole = np.concatenate(
                [distances(features[rows], features[columns]) for columns in blocks(features)], axis=1
            )
            found.append(np.partition(whole, 3, axis=1)[:, 3])
        radii.append(np.concatenate(found))
    covered = [np.zeros(len(features), bool) for features in (reference, samples)]
    for rows in blocks(reference):
        for columns in blocks(samples):
            between = distances(reference[rows], samples[columns])
            covered[1][columns] |= (between <= radii[0][rows, None]).any(axis=0)
            covered[0][rows] |= (between <= radii[1][columns][None]).any(axis=1)
    return float(covered[1].mean()), float(covered[0].mean())


def measure_memory(reference: "np.ndarray", samples: "np.ndarray", device: object) -> None:
    """Prints the peak memory of precision and recall, read every tenth of a second from the kernel."""
    import threading

    import torch

    from evaluations.metrics import precision_recall

    precision_recall(reference[:100], samples[:100])  # what the libraries load lazily is not counted
    torch.zeros(1).amax()
    before, peak, ended = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    try:
        precision, recall = precision_recall(reference, samples, device=device, progress=True)
    finally:
        ended.set()
        watcher.join()
    seconds = time.perf_counter() - begin
    print(f"precision {precision:.4f}, recall {recall:.4f} in {seconds:.1f} s")
    print(f"peak memory {(peak[0] - before) / 2**20:.0f} MiB, above the features")


def anonymous_memory() -> int:
    """Bytes this process holds apart from mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: memory is measured on Linux only; leave it out of --only")


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--references", type=positive_int, default=2000, help="features of the reference")
    parser.add_argument("--samples", type=positive_int, default=5000, help="features compared with it")
    parser.add_argument("--dim", type=positive_int, default=2048, help="numbers a feature")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--float32", action="store_true", help="the published distances in float32")
    parser.add_argument("--runs", type=positive_int, default=2, help="timed runs of each way")
    parser.add_argument("--folder", default=None, help="where the features are written (default: the system's own)")
    parser.add_argument("--device", default="cpu", help="where this project's products are made")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
