"""FID, sFID, Inception Score, precision and recall of class-conditional samples.

    python3 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples/GPT-B-c2i_B_256-….npz

REF and SAMPLES are each an .npz of images (arr_0, uint8 (N, H, W, 3)), an .npz with statistics (mu, sigma, mu_s,
sigma_s), or a folder of images. Features come from the 2015 Inception graph that published figures are made with. The
figures go to SAMPLES.txt, and with the whole protocol to SAMPLES.json. Under torchrun each process reads a share.
"""

import argparse
from typing import TYPE_CHECKING

from utils.cli import add_reading_flags, add_switch, flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from evaluations.c2i.inception import TensorFlowInception, TorchInception
    from evaluations.features import Features
    from evaluations.image_sets import ImageSet
    from evaluations.metrics import Statistics
    from utils.distributed import Distributed

    Inception = TorchInception | TensorFlowInception

NEIGHBOURS = 3
FIGURES = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
    "kid": "KID",
    "kid_deviation": "KID deviation over subsets",
    "fd_dinov2": "FD-DINOv2",
}


def main(args: argparse.Namespace) -> None:
    import os
    import time

    import scipy  # noqa: F401 - what is absent is told before images are read

    from dataset.pixels import Reading
    from evaluations.image_sets import open_images
    from evaluations.judgement import judge, same_images
    from utils.distributed import start
    from utils.logger import console_logger

    if args.ref_batch is None or args.sample_batch is None:
        raise ValueError(
            "two arguments are needed: REF and SAMPLES, each an .npz or a folder of images "
            "(evaluator.py VIRTUAL_imagenet256_labeled.npz samples/….npz)"
        )
    begin = time.perf_counter()
    console_logger("dataset", os.environ.get("RANK", "0") == "0")
    reading = Reading.of(args)
    reference, samples = open_images(args.ref_batch, reading), open_images(args.sample_batch, reading)
    require_enough(reference, samples, args)
    output = output_stem(args)
    require_writable(output)
    warnings = judge(reference, samples, args.task)
    if warnings and args.strict:
        raise ValueError(strict_message(warnings))
    dist = start(args.device)
    with dist.main_first():
        backend = open_backend(args, dist)
    if dist.is_main:
        for line in (*map(describe, ("reference", "samples"), (reference, samples)), f"graph: {backend.path}"):
            print(line)
        print(f"backend: {backend.name} on {backend.device}, graph SHA-256 {backend.sha256}")
        for warning in warnings:  # and again beside the figures: before hours are spent is a good time to know
            print(f"warning: {warning}", flush=True)

    seen = look_at(reference, backend, args, dist, rows=args.precision_recall or args.kid, name="reference")
    sampled = look_at(samples, backend, args, dist, rows=True, name="samples")
    dino = dinov2_distance(reference, samples, args, dist) if args.fd_dinov2 else None
    if dist.is_main:
        figures = compare(seen, sampled, backend, args)
        if dino is not None:
            figures["fd_dinov2"] = dino
        late = [
            warning
            for name, images, features in (("samples", samples, sampled), ("reference images", reference, seen))
            if features.inspection
            for warning in features.inspection.warnings(name, images.lossy)
        ]
        scale = sum(float(features.statistics[0].covariance.trace()) for features in (seen, sampled))
        late += same_images(seen.inspection, sampled.inspection, figures["fid"], scale)
        warnings += late
        if args.save_statistics:
            save_statistics(args.save_statistics, seen)
        report = {
            **figures,
            "warnings": warnings,
            "protocol": protocol(args, reference, samples, backend, dist),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        write_report(output, report)
    dist.close()
    if dist.is_main and late and args.strict:
        raise ValueError(f"{strict_message(late)} (the figures are in {output}.json)")


def require_enough(reference: "ImageSet", samples: "ImageSet", args: argparse.Namespace) -> None:
    """Raises ValueError where the sets do not have what the figures asked for need."""
    if not samples.count:
        raise ValueError(f"{samples.path} has statistics and no images (arr_0), which the Inception Score needs")
    for images in (reference, samples):
        if images.count <= NEIGHBOURS and not (images is reference and images.statistics and not images.count):
            raise ValueError(
                f"{images.path} has {images.count} image{'s' * (images.count != 1)}; at least {NEIGHBOURS + 1} are needed: "
                f"covariances are of many, and precision and recall look at the {NEIGHBOURS} nearest neighbours of each"
            )
    for flag, wanted, rows in (("--kid", args.kid, reference.features), ("--fd-dinov2", args.fd_dinov2, None)):
        if wanted and not reference.count and rows is None:
            raise ValueError(f"{flag} compares images, and {reference.path} has statistics only")


def output_stem(args: argparse.Namespace) -> str:
    """The path of the reports without .txt or .json: --output, else that of the samples."""
    return (args.output or args.sample_batch).removesuffix(".npz").rstrip("/")


def require_writable(output: str) -> None:
    """Raises OSError where the reports could not be written, before the work and not after it."""
    import os

    another = f"the reports {output}.txt and .json cannot be written there: give another place by --output"
    for file in (f"{output}.txt", f"{output}.json"):
        if os.path.isdir(file):
            raise IsADirectoryError(f"{file} is a folder; {another}")
    folder = os.path.dirname(output) or "."
    while not os.path.exists(folder):  # the folders that are missing are made below the first that is there
        folder = os.path.dirname(folder) or "."
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is no folder; {another}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(another)


def strict_message(warnings: list[str]) -> str:
    """The warnings as one error."""
    return "--strict: " + "; ".join(f"({number}) {text}" for number, text in enumerate(warnings, start=1))


def describe(name: str, images: "ImageSet") -> str:
    """One line about a set of images."""
    if not images.count:
        return f"{name}: {images.path}, recorded statistics without images"
    parts = [f"{images.count:,} images, {images.size[1]}x{images.size[0]}, uint8"]
    if images.labels is not None:
        parts.append(f"{len(set(images.labels.tolist())):,} classes")
    if images.statistics is not None:
        parts.append("with recorded statistics")
    return f"{name}: {images.path}, " + ", ".join(parts)


def open_backend(args: argparse.Namespace, dist: "Distributed") -> "Inception":
    """The Inception graph, run by what --backend names."""
    from evaluations.c2i.inception import TensorFlowInception, TorchInception
    from evaluations.published import GRAPH, find_file
    from utils.download import sha256_of

    path = find_file(GRAPH, args.graph)
    backend = TensorFlowInception(path) if args.backend == "tensorflow" else TorchInception(path, dist.device)
    backend.path, backend.sha256 = path, sha256_of(path)
    return backend


def look_at(
    images: "ImageSet", backend: "Inception", args: argparse.Namespace, dist: "Distributed", *, rows: bool, name: str
) -> "Features | None":
    """Features of a set on the first process, None on the others. What the file has recorded is not computed again."""
    from evaluations.features import Features, read_features

    recorded = recorded_statistics(images, backend)
    if recorded is not None and (images.features is not None or not (rows and images.count)):
        return Features(recorded, images.features) if dist.is_main else None
    return read_features(images, backend, dist, batch_size=args.batch_size, keep=rows, recorded=recorded, name=name)


def recorded_statistics(images: "ImageSet", backend: "Inception") -> "list[Statistics] | None":
    """Those of the file, if it has any. Raises ValueError where they are not of this graph's features."""
    from evaluations.metrics import Statistics

    if images.statistics is None:
        return None
    mu, sigma, mu_s, sigma_s = (images.statistics[name] for name in ("mu", "sigma", "mu_s", "sigma_s"))
    for what, mean, covariance in (("mu, sigma", mu, sigma), ("mu_s, sigma_s", mu_s, sigma_s)):
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{images.path}: {what} are {mean.shape} and {covariance.shape}, expected (D,) and (D, D)")
    if len(mu) != backend.pool_dim:
        raise ValueError(
            f"{images.path} has statistics of {len(mu)} features and the graph {backend.path} makes {backend.pool_dim}: "
            "they were recorded with another graph"
        )
    return [Statistics(mu, sigma, None), Statistics(mu_s, sigma_s, None)]


def compare(reference: "Features", samples: "Features", backend: "Inception", args: argparse.Namespace) -> dict:
    """The published five, in the published order, and KID where asked for."""
    from evaluations.metrics import frechet_distance, inception_score, kernel_distance, precision_recall

    figures = {
        "inception_score": inception_score(samples.rows, backend.weights),
        "fid": frechet_distance(reference.statistics[0], samples.statistics[0]),
        "sfid": frechet_distance(reference.statistics[1], samples.statistics[1]),
    }
    if args.precision_recall:
        pair = (None, None)
        if reference.rows is not None:
            pair = precision_recall(
                reference.rows,
                samples.rows,
                neighbours=NEIGHBOURS,
                device="cpu" if backend.name == "tensorflow" else backend.device,
                progress=True,
                float16=not args.exact_distances,
            )
        figures["precision"], figures["recall"] = pair
    if args.kid:
        size = min(1000, len(reference.rows), len(samples.rows))
        figures["kid"], figures["kid_deviation"] = kernel_distance(reference.rows, samples.rows, subset_size=size)
    return figures


def dinov2_distance(
    reference: "ImageSet", samples: "ImageSet", args: argparse.Namespace, dist: "Distributed"
) -> float | None:
    """FD over DINOv2's features (arXiv 2306.04675), on the first process; None on the others."""
    from evaluations.dinov2 import DINOv2Features
    from evaluations.features import read_features
    from evaluations.metrics import frechet_distance

    with dist.main_first():
        extract = DINOv2Features(args.dinov2_ckpt, dist.device)
    seen = [
        read_features(
            images,
            lambda batch: (extract(batch),),
            dist,
            batch_size=args.batch_size,
            keep=False,
            name=f"{name}, DINOv2",
        )
        for images, name in ((reference, "reference"), (samples, "samples"))
    ]
    return frechet_distance(*(features.statistics[0] for features in seen)) if dist.is_main else None


def save_statistics(path: str, reference: "Features") -> None:
    """Writes what a later run needs of the reference: it takes the place of REF, without reading images again."""
    import numpy as np

    from utils.files import atomic_write

    arrays = {
        f"{name}{kind}": value
        for kind, statistics in zip(("", "_s"), reference.statistics, strict=True)
        for name, value in (("mu", statistics.mean), ("sigma", statistics.covariance))
    }
    if reference.rows is not None:
        arrays["pool"] = reference.rows
    with atomic_write(path) as f:
        np.savez(f, **arrays)
    print(f"wrote {path}: give it as REF next time")


def protocol(
    args: argparse.Namespace,
    reference: "ImageSet",
    samples: "ImageSet",
    backend: "Inception",
    dist: "Distributed",
) -> dict:
    """Everything that a figure depends on, JSON values."""
    import platform

    import numpy as np
    import scipy
    import torch

    return {
        "task": args.task,
        "reference": reference.describe(),
        "samples": {**samples.describe(), "settings": sample_settings(output_stem_of(samples))},
        "graph": {"path": str(backend.path), "sha256": backend.sha256},
        "backend": backend.name,
        "device": backend.device,
        "batch_size": args.batch_size,
        "processes": dist.world_size,
        "neighbours": NEIGHBOURS,
        "distances": "exact" if args.exact_distances else "float16",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "torch": torch.__version__,
            **backend.versions,
        },
    }


def output_stem_of(samples: "ImageSet") -> str:
    """The folder a sampling script keeps its PNG files and settings in: the .npz without its ending, or the folder."""
    return str(samples.path).removesuffix(".npz")


def sample_settings(folder: str) -> dict | None:
    """The flags that sample_c2i_ddp.py recorded, where the folder of its images is still there."""
    import json
    from pathlib import Path

    record = Path(folder) / "settings.json"
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None


def write_report(output: str, report: dict) -> None:
    """Prints the figures, writes them as published to .txt, and with the protocol to .json."""
    from utils.files import atomic_write, write_json

    lines = [f"{title}: {report[key]}" for key, title in FIGURES.items() if report.get(key) is not None]
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    print("\n".join(lines))
    with atomic_write(f"{output}.txt") as f:
        f.write(("\n".join(lines) + "\n").encode())
    write_json(f"{output}.json", report)
    print(f"wrote {output}.txt and {output}.json")


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument(
        "ref_batch", nargs="?", metavar="REF", help="reference: .npz or folder of images, or statistics"
    )
    parser.add_argument("sample_batch", nargs="?", metavar="SAMPLES", help="samples: .npz or folder of images")
    parser.add_argument(
        "--task",
        choices=["generation", "reconstruction"],
        default="generation",
        help="which published protocol the input is compared with",
    )
    parser.add_argument(
        "--strict", action="store_true", help="what makes figures incomparable is an error, not a warning"
    )
    parser.add_argument(
        "--backend",
        choices=["torch", "tensorflow"],
        default="torch",
        help="what runs the graph; tensorflow is the reference, torch agrees with it to 1e-5 of the largest feature on a CPU",
    )
    parser.add_argument(
        "--graph",
        default=None,
        help="classify_image_graph_def.pb (default: in the working directory or pretrained_models/, else downloaded)",
    )
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    add_reading_flags(parser)
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at once on each process")
    parser.add_argument("--output", default=None, help="path of the reports, without .txt (default: that of SAMPLES)")
    parser.add_argument(
        "--save-statistics",
        default=None,
        metavar="FILE",
        help="keep the reference's features; give FILE as REF next time",
    )
    add_switch(parser, "--precision-recall", True, "precision and recall (they compare every image with every other)")
    parser.add_argument(
        "--exact-distances",
        action="store_true",
        help="precision and recall without the float16 rounding that published figures have",
    )
    parser.add_argument("--kid", action="store_true", help="also KID, 100 subsets of 1000 images")
    parser.add_argument("--fd-dinov2", action="store_true", help="also the Fréchet distance of DINOv2 features")
    parser.add_argument("--dinov2-ckpt", default=None, help="weights for --fd-dinov2 (default: looked for)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
