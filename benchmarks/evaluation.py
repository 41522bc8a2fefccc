"""How fast an evaluation is from files to figures: this evaluator against the published method, in one run.

    python3 benchmarks/evaluation.py --images 2000

The published method: features by TensorFlow, all kept; np.cov; the root of the product of covariances by
scipy.linalg.sqrtm; distances in TensorFlow's float16. Same files, same cores, one after the other, each in a process of
its own. Random smooth images; without --graph, a graph of the published network's shape with random weights, which cost
what trained ones cost. Both sets have --images images.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks.inception import receive, write_graph
from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    import numpy as np

FIVE = ("inception_score", "fid", "sfid", "precision", "recall")


def main(args: argparse.Namespace) -> None:
    from multiprocessing import get_context

    context = get_context("spawn")
    answers = {}
    with TemporaryDirectory(dir=args.folder) as folder:
        graph = args.graph or write_graph(Path(folder))
        files = [Path(folder) / f"{name}.npz" for name in ("reference", "samples")]
        for seed, path in enumerate(files):
            write_images(path, args.images, args.image_size, seed)
        for name in ("published", "this"):
            pipe, other = context.Pipe()
            process = context.Process(target=work, args=(name, graph, files, args, other), daemon=True)
            process.start()
            other.close()
            answers[name] = receive(name, pipe)
            process.join()
    print(f"twice {args.images} images of {args.image_size} pixels, {args.threads} thread(s)")
    print("| | published, s | this, s | ratio |\n|---|---|---|---|")
    for part in ("reading and looking", "features", "statistics and metrics", "total"):
        theirs, ours = (answers[name][part] for name in ("published", "this"))
        print(f"| {part} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.2f} |")
    for figure in FIVE:
        print(f"{figure}: {answers['published'][figure]:.6f} and {answers['this'][figure]:.6f}")


def write_images(path: Path, count: int, size: int, seed: int) -> None:
    """An .npz of smooth random images."""
    import numpy as np
    from PIL import Image

    from utils.images import write_image_npz

    generator = np.random.default_rng(seed)
    images = (
        np.asarray(Image.fromarray(generator.integers(0, 256 - 8 * seed, (16, 16, 3), np.uint8)).resize((size, size)))
        for _ in range(count)
    )
    write_image_npz(path, images, (count, size, size, 3), np.arange(count))


def work(name: str, graph: str | Path, files: list[Path], args: argparse.Namespace, pipe: "Connection") -> None:
    """Sends seconds and figures of one way."""
    import os

    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(args.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    try:
        pipe.send((published if name == "published" else this)(graph, files, args))
    except (ValueError, OSError) as error:
        pipe.send(str(error))


class Timed:
    """A function that adds up its seconds."""

    def __init__(self, function: "Callable"):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: object) -> object:
        begin = time.perf_counter()
        result = self.function(*arguments)
        self.seconds += time.perf_counter() - begin
        return result


def published(graph: str | Path, files: list[Path], args: argparse.Namespace) -> dict:
    """Everything in memory, dense roots, float16 in TensorFlow."""
    import numpy as np
    import scipy.linalg

    from benchmarks.metrics import published_neighbours
    from evaluations.c2i.inception import TensorFlowInception

    backend = TensorFlowInception(graph, threads=args.threads)
    extract = Timed(backend)
    extract(np.zeros((2, 64, 64, 3), np.uint8))
    begin, extract.seconds = time.perf_counter(), 0.0
    reading, sets = 0.0, []
    for path in files:
        opened = time.perf_counter()
        with np.load(path) as archive:
            images = archive["arr_0"]
        reading += time.perf_counter() - opened
        parts = [extract(images[start : start + args.batch_size]) for start in range(0, len(images), args.batch_size)]
        sets.append([np.concatenate(kind) for kind in zip(*parts, strict=True)])

    def distance(a: "np.ndarray", b: "np.ndarray") -> float:
        (mu_a, sigma_a), (mu_b, sigma_b) = ((f.mean(axis=0), np.cov(f, rowvar=False)) for f in (a, b))
        root = scipy.linalg.sqrtm(sigma_a.dot(sigma_b))
        return float(((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.trace(root).real)

    scores = []
    logits = sets[1][0] @ backend.weights
    for start in range(0, len(logits), 5000):
        p = np.exp(logits[start : start + 5000] - logits[start : start + 5000].max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0))), axis=1))))
    figures = {
        "inception_score": float(np.mean(scores)),
        "fid": distance(sets[0][0], sets[1][0]),
        "sfid": distance(sets[0][1], sets[1][1]),
    }
    figures["precision"], figures["recall"] = published_neighbours(sets[0][0], sets[1][0], float32=False)
    return {**figures, **seconds(begin, extract.seconds, reading)}


def this(graph: str | Path, files: list[Path], args: argparse.Namespace) -> dict:
    """As evaluator.py does it."""
    from functools import partial

    import numpy as np
    import torch

    from evaluations.c2i import evaluator
    from evaluations.c2i.inception import TorchInception
    from evaluations.features import read_features
    from evaluations.image_sets import open_images
    from evaluations.judgement import Inspection
    from utils.distributed import start

    torch.set_num_threads(args.threads)
    dist = start("cpu")
    backend = TorchInception(graph)
    extract, look = Timed(backend), Timed(Inspection.look)
    extract(np.zeros((2, 64, 64, 3), np.uint8))
    Inspection.look = lambda inspection, images: look(inspection, images)
    begin, extract.seconds = time.perf_counter(), 0.0
    reading, seen = 0.0, []
    for path in files:
        images = open_images(path)
        next_batch = Timed(partial(next, images.batches(0, images.count, args.batch_size), None))
        images.batches = partial(timed_batches, next_batch)
        seen.append(read_features(images, extract, dist, batch_size=args.batch_size, keep=True))
        reading += next_batch.seconds
    figures = evaluator.compare(*seen, backend, evaluator.flags().parse_args([]))
    return {**figures, **seconds(begin, extract.seconds, reading + look.seconds)}


def timed_batches(next_batch: Timed, *_: object) -> "Iterator[np.ndarray]":
    """In the place of an image set's own."""
    while (batch := next_batch()) is not None:
        yield batch


def seconds(begin: float, features: float, reading: float) -> dict[str, float]:
    """Where the time since `begin` went."""
    total = time.perf_counter() - begin
    return {
        "reading and looking": reading,
        "features": features,
        "statistics and metrics": total - features - reading,
        "total": total,
    }


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--images", type=positive_int, default=2000, help="images of either set")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images a batch")
    parser.add_argument("--image-size", type=positive_int, default=256, help="pixels a side")
    parser.add_argument("--threads", type=positive_int, default=2, help="threads and cores of each way")
    parser.add_argument("--graph", default=None, help="a graph file (default: random weights in the published shape)")
    parser.add_argument("--folder", default=None, help="where the images are written meanwhile")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
