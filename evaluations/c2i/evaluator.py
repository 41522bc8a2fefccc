"""FID, sFID, Inception Score, precision and recall of class-conditional samples.

    python3 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples/GPT-B-c2i_B_256-….npz

REF and SAMPLES are each an .npz of images (arr_0, uint8 (N, H, W, 3)), an .npz with statistics (mu, sigma, mu_s,
sigma_s), or a folder of images. Features come from the 2015 Inception graph that published figures are made with. The
figures go to SAMPLES.txt, and with the whole protocol to SAMPLES.json. Under torchrun each process reads a share.
"""

import argparse
from typing import TYPE_CHECKING

from evaluations.report import Report, add_evaluation_flags, open_backend, sample_settings, versions
from utils.cli import add_switch, flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from evaluations.features import Features
    from evaluations.image_sets import ImageSet
    from evaluations.metrics import Statistics
    from evaluations.report import Inception
    from utils.distributed import Distributed

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
    console_logger("dataset", os.environ.get("RANK", "0") == "0")
    reading = Reading.of(args)
    reference, samples = open_images(args.ref_batch, reading), open_images(args.sample_batch, reading)
    require_enough(reference, samples, args)
    report = Report((args.output or args.sample_batch).removesuffix(".npz").rstrip("/"), args.strict)
    report.warn(judge(reference, samples, args.task))
    dist = start(args.device)
    with dist.main_first():
        backend = open_backend(args, dist)
    if dist.is_main:
        graph = f"graph: {backend.path} by {backend.name} on {backend.device}, SHA-256 {backend.sha256}"
        report.print_inputs([describe("reference", reference), describe("samples", samples), graph])

    seen = look_at(reference, backend, args, dist, rows=args.precision_recall or args.kid, name="reference")
    sampled = look_at(samples, backend, args, dist, rows=True, name="samples")
    dino = dinov2_distance(reference, samples, args, dist) if args.fd_dinov2 else None
    late = []
    if dist.is_main:
        figures = compare(seen, sampled, backend, args) | ({} if dino is None else {"fd_dinov2": dino})
        for name, images, features in (("samples", samples, sampled), ("reference images", reference, seen)):
            late += features.inspection.warnings(name, images.lossy) if features.inspection else []
        scale = sum(float(features.statistics[0].covariance.trace()) for features in (seen, sampled))
        late += same_images(seen.inspection, sampled.inspection, figures["fid"], scale)
        report.warnings += late
        if args.save_statistics:
            save_statistics(args.save_statistics, seen)
        report.write(figures, FIGURES, protocol(args, reference, samples, backend, dist))
    dist.close()
    report.warn(late, late=True)


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


def describe(name: str, images: "ImageSet") -> str:
    """Return one line about a set of images."""
    if not images.count:
        return f"{name}: {images.path}, recorded statistics without images"
    parts = [f"{images.count:,} images, {images.size[1]}x{images.size[0]}, uint8"]
    if images.labels is not None:
        parts.append(f"{len(set(images.labels.tolist())):,} classes")
    if images.statistics is not None:
        parts.append("with recorded statistics")
    return f"{name}: {images.path}, " + ", ".join(parts)


def look_at(
    images: "ImageSet", backend: "Inception", args: argparse.Namespace, dist: "Distributed", *, rows: bool, name: str
) -> "Features | None":
    """Return features of a set on the first process, None on the others. What the file has recorded is not computed again."""
    from evaluations.features import Features, read_features

    recorded = recorded_statistics(images, backend)
    if recorded is not None and (images.features is not None or not (rows and images.count)):
        return Features(recorded, images.features) if dist.is_main else None
    return read_features(images, backend, dist, batch_size=args.batch_size, keep=rows, recorded=recorded, name=name)


def recorded_statistics(images: "ImageSet", backend: "Inception") -> "list[Statistics] | None":
    """Return the statistics recorded in the file, if any. Raises ValueError where they are not of this graph's features."""
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
    """Return the published five, in the published order, and KID where asked for."""
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
    args: argparse.Namespace, reference: "ImageSet", samples: "ImageSet", backend: "Inception", dist: "Distributed"
) -> dict:
    """Return everything that a figure depends on, JSON values."""
    return {
        "task": args.task,
        "reference": reference.describe(),
        # A sampling script keeps its PNG files and settings in the folder of the .npz's name.
        "samples": {**samples.describe(), "settings": sample_settings(str(samples.path).removesuffix(".npz"))},
        "graph": {"path": str(backend.path), "sha256": backend.sha256},
        "backend": backend.name,
        "device": backend.device,
        "batch_size": args.batch_size,
        "processes": dist.world_size,
        "neighbours": NEIGHBOURS,
        "distances": "exact" if args.exact_distances else "float16",
        "versions": versions(backend),
    }


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument(
        "ref_batch", nargs="?", metavar="REF", help="reference: .npz or folder of images, or statistics"
    )
    parser.add_argument("sample_batch", nargs="?", metavar="SAMPLES", help="samples: .npz or folder of images")
    help = "which published protocol the input is compared with"
    parser.add_argument("--task", choices=["generation", "reconstruction"], default="generation", help=help)
    add_evaluation_flags(parser, "that of SAMPLES")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at once on each process")
    help = "keep the reference's features; give FILE as REF next time"
    parser.add_argument("--save-statistics", default=None, metavar="FILE", help=help)
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
