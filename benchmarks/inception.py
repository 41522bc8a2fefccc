"""How fast the evaluator's features are computed: the Inception graph in torch against TensorFlow, in one run.

    python3 benchmarks/inception.py --images 64 --batch-size 16

Each backend is in a process of its own with the same number of threads on the same cores, and they take turns pass by
pass, so that another job on the machine slows both alike. Random images; without --graph, a graph of the published
network's shape with random weights, which cost what trained ones cost. Reading the graph is not timed.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import numpy as np


def main(args: argparse.Namespace) -> None:
    from multiprocessing import get_context

    import numpy as np

    context = get_context("spawn")
    pipes, processes = {}, []
    with TemporaryDirectory() as folder:
        graph = args.graph or write_graph(Path(folder))
        try:
            for name in ("tensorflow", "torch"):
                pipes[name], other = context.Pipe()
                processes.append(context.Process(target=serve, args=(name, graph, args, other), daemon=True))
                processes[-1].start()
                other.close()
            features = {name: receive(name, pipe) for name, pipe in pipes.items()}  # the warm-up's
            seconds = {name: [] for name in pipes}
            for _ in range(args.runs):
                for name, pipe in pipes.items():
                    pipe.send("run")
                    seconds[name].append(receive(name, pipe))
        finally:
            for pipe in pipes.values():
                pipe.close()
            for process in processes:
                process.join()

    difference = max(
        float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        for ours, theirs in zip(features["torch"], features["tensorflow"], strict=True)
    )
    print(
        f"{args.images} images of {args.image_size} pixels in batches of {args.batch_size}, {args.threads} thread(s), "
        f"{args.runs} passes; largest difference of a feature {difference:.1e} of the largest feature"
    )
    print("| backend | images/s, median | best | ratio of medians |\n|---|---|---|---|")
    first = statistics.median(seconds["tensorflow"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"| {name} | {args.images / median:.2f} | {args.images / min(taken):.2f} | {first / median:.2f} |")


def write_graph(folder: Path) -> Path:
    """A graph of the published network's shape with random weights."""
    from tests.evaluations.graphs import inception_graph

    path = folder / "inception.pb"
    path.write_bytes(inception_graph())
    return path


def receive(name: str, pipe: "Connection") -> "float | tuple[np.ndarray, np.ndarray]":
    """What a worker answers. Raises ValueError where it failed."""
    try:
        answer = pipe.recv()
    except EOFError:
        raise ValueError(f"the {name} process ended early") from None
    if isinstance(answer, str):
        raise ValueError(f"{name}: {answer}")
    return answer


def serve(name: str, graph: str | Path, args: argparse.Namespace, pipe: "Connection") -> None:
    """Sends the features of a first pass, then the seconds of a pass for each "run", until the pipe is closed."""
    try:
        features, images = prepare(name, graph, args)
        pipe.send(one_pass(features, images, args.batch_size))
    except (ValueError, OSError) as error:
        pipe.send(str(error))
        return
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        begin = time.perf_counter()
        one_pass(features, images, args.batch_size)
        pipe.send(time.perf_counter() - begin)


def prepare(name: str, graph: str | Path, args: argparse.Namespace) -> tuple:
    """The backend with its number of threads, and the images."""
    import numpy as np

    from evaluations.c2i.inception import TensorFlowInception, TorchInception

    if hasattr(os, "sched_setaffinity"):
        # TensorFlow uses some of its threads for other things than operations: the cores are what has to be the same.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if name == "torch":
        import torch

        torch.set_num_threads(args.threads)
        features = TorchInception(graph)
    else:
        features = TensorFlowInception(graph, threads=args.threads)
    shape = (args.images, args.image_size, args.image_size, 3)
    return features, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def one_pass(features: object, images: "np.ndarray", batch_size: int) -> "tuple[np.ndarray, np.ndarray]":
    """The features of all images."""
    import numpy as np

    batches = [features(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    pool, spatial = zip(*batches, strict=True)
    return np.concatenate(pool), np.concatenate(spatial)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--images", type=positive_int, default=64, help="images a pass")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="images a batch")
    parser.add_argument("--image-size", type=positive_int, default=256, help="pixels a side")
    parser.add_argument("--threads", type=positive_int, default=1, help="threads and cores of each backend")
    parser.add_argument("--runs", type=positive_int, default=5, help="timed passes")
    parser.add_argument("--graph", default=None, help="a graph file (default: random weights in the published shape)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
