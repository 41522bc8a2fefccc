"""What makes a figure incomparable with published ones, said before anyone publishes it.

    warnings = judge(reference, samples, task="generation")

The traps are those that users of the published systems report: another reference set, fewer samples, unbalanced
classes, JPEG files, resized images, the same images many times.
"""

import zlib
from pathlib import PurePath

import numpy as np

from evaluations.image_sets import ImageSet

PUBLISHED_SAMPLES = 50_000
PUBLISHED_SIZE = (256, 256)
# Steps across the borders of JPEG's 8x8 blocks over steps within them. Photographs that were compressed before they were
# made smaller, or never, are within a few per cent of 1; at quality 75 they reach 1.13 to 1.27.
BLOCKINESS = 1.15
_IMPROBABLE = 1e-6


def judge(reference: ImageSet, samples: ImageSet, task: str = "generation") -> list[str]:
    """Warnings about two sets of images, from what is known before they are read.

    task: 'generation' (samples of a model against the training set's statistics) or 'reconstruction' (images through a
    tokenizer against the same images, rFID).
    """
    found = []
    if task == "reconstruction":
        if reference.count and samples.count != reference.count:
            found.append(
                f"{samples.count:,} reconstructions for {reference.count:,} reference images: rFID compares the same "
                "images before and after the tokenizer"
            )
        if reference.statistics is not None:
            found.append(
                f"{reference.path} has statistics of its own, as references of generated samples have; rFID is against the "
                "images that were encoded (val_ddp.py writes them)"
            )
        if reference.count != PUBLISHED_SAMPLES:
            found.append(
                f"the reference has {reference.count:,} images; published rFID is over the {PUBLISHED_SAMPLES:,} of "
                "ImageNet's validation set"
            )
    else:
        if samples.count != PUBLISHED_SAMPLES:
            found.append(
                f"{samples.count:,} samples; published figures are of {PUBLISHED_SAMPLES:,}, and FID falls with the number "
                "of samples"
            )
        if reference.statistics is None:
            validation = reference.count == PUBLISHED_SAMPLES or "val" in _words(reference.path)
            what = "it looks like the validation set; " if validation else ""
            found.append(
                f"{reference.path} has {reference.count:,} images and no recorded statistics: {what}published figures are "
                "against statistics of the training set (VIRTUAL_imagenet256_labeled.npz)"
            )
        found += _class_balance(samples)
    if not reference.count and reference.features is None:
        found.append(f"{reference.path} has no images: precision and recall are left out")
    if reference.size is not None and samples.size != reference.size:
        found.append(
            f"the samples are {_size(samples)} and the reference {_size(reference)}: each is resized by the graph on its "
            "own; sample_c2i_ddp.py --image-size-eval resizes as published"
        )
    elif samples.size != PUBLISHED_SIZE:
        found.append(
            f"the samples are {_size(samples)}; published figures are of {PUBLISHED_SIZE[0]}x{PUBLISHED_SIZE[1]}"
        )
    for images, name in ((reference, "reference"), (samples, "samples")):
        if images.lossy:
            found.append(
                f"{images.lossy:,} of the {images.count:,} files of the {name} are JPEG or WebP: compression alone changes "
                "FID; use PNG or an .npz"
            )
    return found


class Inspection:
    """What can be told only by looking at the pixels: copies, and JPEG's blocks in images that are no JPEG files.

    for batch in ...: inspection.look(batch)
    warnings = inspection.warnings("samples")
    """

    def __init__(self):
        self.hashes: list[int] = []
        self.across = self.within = 0.0

    def look(self, images: np.ndarray) -> None:
        """images: uint8 (n, H, W, 3)."""
        self.hashes += [zlib.crc32(image.tobytes()) << 32 | zlib.adler32(image.tobytes()) for image in images]
        across, within = _steps(images[:4])
        self.across += across
        self.within += within

    def merge(self, other: "Inspection") -> None:
        """Adds what another process has seen."""
        self.hashes += other.hashes
        self.across += other.across
        self.within += other.within

    @property
    def blockiness(self) -> float:
        """Mean step across the borders of 8x8 blocks over the mean step within; about 1 without JPEG, 1 for flat images."""
        return self.across / self.within if self.within else 1.0

    @property
    def copies(self) -> int:
        """Images that are exact copies of an earlier one."""
        return len(self.hashes) - len(set(self.hashes))

    def warnings(self, name: str, lossy: int = 0) -> list[str]:
        """What is to be said of the set called `name`, of which `lossy` files are known to be compressed."""
        found = []
        if self.copies:
            found.append(
                f"{self.copies:,} of the {len(self.hashes):,} {name} are exact copies of others: were several processes "
                "given the same seed?"
            )
        if not lossy and self.blockiness > BLOCKINESS:
            found.append(
                f"steps across the borders of 8x8 blocks are {self.blockiness:.2f} times those within them in the {name}: "
                "were the images compressed as JPEG, or upsampled from such?"
            )
        return found


def _steps(images: np.ndarray) -> tuple[float, float]:
    """Mean absolute steps between neighbouring pixels: across the borders of 8x8 blocks, and within blocks."""
    across, within = [], []
    for axis in (1, 2):
        if images.shape[axis] < 24:
            continue
        values = np.moveaxis(images, axis, 1).astype(np.int16)
        steps = np.abs(np.diff(values, axis=1)).mean(axis=(0, 2, 3))
        border = np.arange(len(steps)) % 8 == 7
        across.append(steps[border].mean())
        within.append(steps[~border].mean())
    return (float(np.mean(across)), float(np.mean(within))) if across else (0.0, 0.0)


def _class_balance(samples: ImageSet) -> list[str]:
    """Whether the labels could have been drawn evenly: Pearson's chi-squared test, and the rarest and commonest class."""
    if samples.labels is None:
        return []
    from scipy.stats import binom, chi2

    counts = np.bincount(samples.labels - min(samples.labels.min(), 0))
    classes = len(counts)
    expected = len(samples.labels) / classes
    if classes < 2 or expected < 5:
        return []
    statistic = float(((counts - expected) ** 2).sum() / expected)
    chances = (
        chi2.sf(statistic, classes - 1),
        classes * binom.cdf(counts.min(), counts.sum(), 1 / classes),
        classes * binom.sf(counts.max() - 1, counts.sum(), 1 / classes),
    )
    if min(chances) > _IMPROBABLE:
        return []
    return [
        f"the samples' classes are unbalanced: from {counts.min():,} to {counts.max():,} images of each of {classes} "
        "classes, more than chance gives"
    ]


def _size(images: ImageSet) -> str:
    return "unknown" if images.size is None else f"{images.size[1]}x{images.size[0]}"


def _words(path: PurePath) -> set[str]:
    return set(path.stem.lower().replace("-", "_").replace(".", "_").split("_"))
