"""Times an evaluation from files to figures, beside the published method on the same features.

    python3 benchmarks/evaluation.py --images 2000

Both sets are random smooth images. The published method reads everything into memory, takes np.cov and roots the product
of covariances by scipy.linalg.sqrtm. Features are timed by torch, and by TensorFlow where it is installed.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    import numpy as np

Result = TypeVar("Result")


def main(args: argparse.Namespace) -> None:
    from evaluations import metrics
    from evaluations.c2i.inception import TensorFlowInception, TorchInception
    from evaluations.features import read_features
    from evaluations.image_sets import open_images
    from evaluations.published import GRAPH, find_file
    from utils.distributed import start

    dist, graph = start(args.device), find_file(GRAPH, args.graph)
    print(f"twice {args.images} images of {args.image_size} pixels, {dist.device.type}\n| what | s |\n|---|---|")
    with TemporaryDirectory(dir=args.folder) as folder:
        sets = [open_images(write_images(Path(folder) / f"{seed}.npz", args, seed)) for seed in range(2)]
        inception = TorchInception(graph, dist.device)
        read = [
            timed("reading and features, torch", read_features, images, inception, dist, batch_size=64, keep=True)
            for images in sets
        ]
        if importlib.util.find_spec("tensorflow"):
            timed("features of one set, TensorFlow", run_all, TensorFlowInception(graph), sets[0])
    first, second = ([features.statistics[0], features.rows] for features in read)
    timed("Fréchet distance", metrics.frechet_distance, first[0], second[0])
    timed("Fréchet distance, np.cov and sqrtm", published_distance, first[1], second[1])
    timed("precision and recall", metrics.precision_recall, first[1], second[1], float16=True, device=dist.device)
    timed("precision and recall, exact", metrics.precision_recall, first[1], second[1], device=dist.device)
    timed("Inception Score", metrics.inception_score, second[1], inception.weights)


def timed(what: str, work: Callable[..., Result], *arguments: object, **settings: object) -> Result:
    """Prints the seconds of a call as a row of the table and returns the call's result."""
    began = time.perf_counter()
    result = work(*arguments, **settings)
    print(f"| {what} | {time.perf_counter() - began:.1f} |", flush=True)
    return result


def run_all(inception: Callable, images: object) -> None:
    """Passes all images through an Inception."""
    for batch in images.batches(0, images.count, 64):
        inception(batch)


def published_distance(a: "np.ndarray", b: "np.ndarray") -> float:
    """Return the Fréchet distance of features (N, D) and (M, D) by the root of the product of covariances."""
    import numpy as np
    import scipy.linalg

    (mu_a, sigma_a), (mu_b, sigma_b) = ((f.mean(axis=0), np.cov(f, rowvar=False)) for f in (a, b))
    root = scipy.linalg.sqrtm(sigma_a.dot(sigma_b))
    return float(((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a + sigma_b) - 2 * np.trace(root).real)


def write_images(path: Path, args: argparse.Namespace, seed: int) -> Path:
    """Writes an .npz of smooth random images and returns its path."""
    import numpy as np
    from PIL import Image

    from utils.images import write_image_npz

    draw, size = np.random.default_rng(seed), (args.image_size, args.image_size)
    small = (draw.integers(0, 256 - 8 * seed, (16, 16, 3), np.uint8) for _ in range(args.images))
    images = (np.asarray(Image.fromarray(one).resize(size)) for one in small)
    write_image_npz(path, images, (args.images, *size, 3), np.arange(args.images))
    return path


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--images", type=positive_int, default=2000, help="images of either set")
    parser.add_argument("--image-size", type=positive_int, default=256, help="pixels a side")
    parser.add_argument("--graph", default=None, help="the Inception graph's file (default: looked for)")
    parser.add_argument("--folder", default=None, help="where the images are written meanwhile")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
