"""Features of a set of images: each process computes its share, the first one gets statistics and rows of all.

seen = read_features(open_images("samples.npz"), TorchInception(graph), dist, batch_size=64, keep=True)
seen.statistics[0].mean, seen.rows            # (D,), (N, D)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
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
    name: str,
    recorded: list[Statistics] | None = None,
) -> Features | None:
    """Pass all images through `extract`: uint8 (n, H, W, 3) to one array of features (n, D) for each kind.

    keep: whether the rows of the first kind are needed. recorded: statistics that take the place of the images', which are
    not read where nothing else is needed of them. Returns None on all processes but the first.
    Raises ValueError for damaged images, and with the images' numbers for features that are not finite.
    """
    if recorded and (images.features is not None or not (keep and images.count)):
        return Features(recorded, images.features) if dist.is_main else None
    start, stop = (images.count * rank // dist.world_size for rank in (dist.rank, dist.rank + 1))
    running: list[RunningStatistics] = []
    rows, inspection, place = [], Inspection(), start
    with tqdm(total=stop - start, unit="img", desc=name, disable=not dist.is_main) as bar:
        for batch in images.batches(start, stop, batch_size):
            inspection.look(batch)
            kinds = extract(batch)
            running = running or [RunningStatistics(kind.shape[1]) for kind in kinds]
            for total, kind in zip(running, kinds, strict=True):
                try:
                    total.update(kind)
                except ValueError as error:
                    raise ValueError(f"{images.path}, images {place} to {place + len(batch) - 1}: {error}") from error
            rows += [kinds[0].astype(np.float32)] if keep else []
            place += len(batch)
            bar.update(len(batch))
    shares = dist.collect((running, rows, inspection))
    if shares is None:
        return None
    for parts, share, other in shares[1:]:
        for total, part in zip(running, parts):
            total.merge(part)
        running = running or parts  # with fewer images than processes the first has none
        rows += share
        inspection.merge(other)
    statistics = recorded or [total.result() for total in running]
    return Features(statistics, np.concatenate(rows) if keep else None, inspection)


def normalised(images: np.ndarray, size: int, mean: tuple[float, ...], deviation: tuple[float, ...]) -> torch.Tensor:
    """Return uint8 (B, H, W, 3) as float32 (B, 3, size, size), resized as bytes by Pillow's antialiased bicubic filter."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 (images, height, width, 3)")
    resized = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        picture = Image.fromarray(np.ascontiguousarray(image))
        resized[i] = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    values = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
