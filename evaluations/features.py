"""Features of a set of images: each process computes its share, the first one gets statistics and rows of all.

seen = read_features(open_images("samples.npz"), TorchInception(graph), dist, batch_size=64, keep=True)
seen.statistics[0].mean, seen.rows            # (D,), (N, D)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from evaluations.image_sets import ImageSet
from evaluations.judgement import Inspection
from evaluations.metrics import RunningStatistics, Statistics
from utils.distributed import Distributed


@dataclass
class Features:
    """Statistics of each kind of features, rows of the first kind (N, D) float32 where kept, what the pixels showed."""

    statistics: list[Statistics]
    rows: np.ndarray | None = None
    inspection: Inspection | None = None


def read_features(
    images: ImageSet,
    extract: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    dist: Distributed,
    *,
    batch_size: int,
    keep: bool,
    recorded: list[Statistics] | None = None,
    name: str = "images",
) -> Features | None:
    """Passes all images through `extract`: uint8 (n, H, W, 3) to one array of features (n, D) for each kind.

    keep: whether the rows of the first kind are needed. recorded: statistics that take the place of the images'.
    Returns None on all processes but the first. Raises ValueError for damaged images, and with the images' numbers for
    features that are not finite.
    """
    start, stop = (images.count * rank // dist.world_size for rank in (dist.rank, dist.rank + 1))
    running: list[RunningStatistics] = []
    rows, inspection, place = None, Inspection(), start
    with tqdm(total=stop - start, unit="img", desc=name, disable=not dist.is_main) as bar:
        for batch in images.batches(start, stop, batch_size):
            inspection.look(batch)
            kinds = extract(batch)
            if recorded is None:
                running = running or [RunningStatistics(kind.shape[1]) for kind in kinds]
                for total, kind in zip(running, kinds, strict=True):
                    try:
                        total.update(kind)
                    except ValueError as error:
                        last = place + len(batch) - 1
                        raise ValueError(f"{images.path}, images {place} to {last}: {error}") from error
            if keep:
                if rows is None:
                    rows = np.empty((stop - start, kinds[0].shape[1]), np.float32)
                rows[place - start : place - start + len(batch)] = kinds[0]
            place += len(batch)
            bar.update(len(batch))
    shares = dist.collect((running, rows, inspection))
    if shares is None:
        return None
    for parts, _, other in shares[1:]:
        for total, part in zip(running, parts):
            total.merge(part)
        running = running or parts  # with fewer images than processes the first has none
        inspection.merge(other)
    if keep and len(shares) > 1:
        rows = np.concatenate([share for _, share, _ in shares if share is not None])
    return Features(recorded or [total.result() for total in running], rows, inspection)
