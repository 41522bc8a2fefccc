"""The work of evaluator.py: two sets of images opened, judged, read and compared."""

import argparse
import os

from dataset.pixels import Reading
from evaluations.c2i.inception import Inception
from evaluations.features import Features, read_features
from evaluations.image_sets import ImageSet, open_images, save_statistics
from evaluations.judgement import judge, same_images
from evaluations.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from evaluations.report import Report, describe_run, open_backend, require_same_graph, sample_settings
from utils.distributed import Distributed, start
from utils.logger import console_logger

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


def evaluate(args: argparse.Namespace) -> None:
    """Compute the figures that the flags ask for and write the reports, on all processes of the run."""
    console_logger("dataset", os.environ.get("RANK", "0") == "0")
    reference, samples = (open_images(path, Reading.of(args)) for path in (args.ref_batch, args.sample_batch))
    require_enough(reference, samples, args)
    report = Report((args.output or args.sample_batch).removesuffix(".npz").rstrip("/"), args.strict)
    report.warn(judge(reference, samples, args.task))
    dist = start(args.device)
    with dist.main_first():
        backend = open_backend(args, dist)
    require_same_graph(reference, backend)
    made = {"graph": backend.sha256, "inception_resize": "graph"}
    reference.require_made_with(**made)
    if dist.is_main:
        graph = f"graph: {backend.path} by {backend.name} on {backend.device}, SHA-256 {backend.sha256}"
        report.print_inputs([f"reference: {reference.line()}", f"samples: {samples.line()}", graph])

    asked = {"dist": dist, "batch_size": args.batch_size}
    rows = args.precision_recall or args.kid
    seen = read_features(reference, backend, **asked, keep=rows, name="reference", recorded=reference.statistics)
    sampled = read_features(samples, backend, **asked, keep=True, name="samples", recorded=samples.statistics)
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
            save_statistics(args.save_statistics, seen.statistics, seen.rows, made)
            print(f"wrote {args.save_statistics}: give it as REF next time")
        report.write(figures, FIGURES, protocol(args, reference, samples, backend, dist))
    dist.close()
    report.warn(late, late=True)


def require_enough(reference: ImageSet, samples: ImageSet, args: argparse.Namespace) -> None:
    """Raise ValueError where the sets do not have what the figures asked for need."""
    if not samples.count:
        raise ValueError(f"{samples.path} has statistics and no images (arr_0), which the Inception Score needs")
    for images in (reference, samples):
        if images.statistics and len(images.statistics) < 2:
            raise ValueError(f"{images.path} has mu and sigma alone; sFID needs mu_s and sigma_s too: give images")
        if images.count <= NEIGHBOURS and not (images is reference and images.statistics and not images.count):
            raise ValueError(f"{images.path} has {images.count} images; precision and recall need {NEIGHBOURS + 1}")
    for flag, wanted, rows in (("--kid", args.kid, reference.features), ("--fd-dinov2", args.fd_dinov2, None)):
        if wanted and not reference.count and rows is None:
            raise ValueError(f"{flag} compares images, and {reference.path} has statistics only")


def compare(reference: Features, samples: Features, backend: Inception, args: argparse.Namespace) -> dict:
    """Return the published five, in the published order, and KID where asked for."""
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
    reference: ImageSet, samples: ImageSet, args: argparse.Namespace, dist: Distributed
) -> float | None:
    """Return FD over DINOv2's features (arXiv 2306.04675) on the first process, None on the others."""
    from evaluations.dinov2 import DINOv2Features  # timm takes seconds, and one flag needs it

    with dist.main_first():
        network = DINOv2Features(args.dinov2_ckpt, dist.device)
    first, second = (
        read_features(images, lambda batch: (network(batch),), dist, batch_size=args.batch_size, keep=False, name=name)
        for images, name in ((reference, "reference, DINOv2"), (samples, "samples, DINOv2"))
    )
    return frechet_distance(first.statistics[0], second.statistics[0]) if dist.is_main else None


def protocol(
    args: argparse.Namespace, reference: ImageSet, samples: ImageSet, backend: Inception, dist: Distributed
) -> dict:
    """Return everything that a figure depends on, JSON values."""
    return {
        "task": args.task,
        "reference": reference.describe(),
        # A sampling script keeps its PNG files and settings in the folder of the .npz's name.
        "samples": {**samples.describe(), "settings": sample_settings(str(samples.path).removesuffix(".npz"))},
        "batch_size": args.batch_size,
        "neighbours": NEIGHBOURS,
        "distances": "exact" if args.exact_distances else "float16",
        **describe_run(backend, dist),
    }
