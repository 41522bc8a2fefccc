"""Judgement of figures: what makes one incomparable with published ones, said before anyone publishes it.

    warnings = judge(reference, samples, task="generation")

The traps are those that users of the published systems report: another reference set, fewer samples, unbalanced
classes, JPEG files, resized images, the same images many times or on both sides.
"""

import re
import zlib

import numpy as np
from scipy.fft import dctn
from scipy.stats import binom, chi2

from evaluations.image_sets import ImageSet

PUBLISHED_SAMPLES = 50_000
PUBLISHED_SIZE = (256, 256)
_IMPROBABLE = 1e-6
# An FID of a set with itself is rounding, some 1e-8 of the variances; two halves of one large set are at 1e-3 of them.
_SAME = 1e-5
# JPEG's steps, and the lowest frequencies (row, column) after the mean. How well a frequency fits its best step is the mean
# cosine of value / step: 0.88 at quality 75, 0.43 at 90, below 0.2 for what never was JPEG (the third lowest of the nine).
_STEPS = np.arange(2, 64)
_FREQUENCIES = ((0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))
_QUANTISED = 0.33


def judge(reference: ImageSet, samples: ImageSet, task: str = "generation") -> list[str]:
    """Return warnings about two sets of images, from what is known before they are read.

    task: 'generation' (samples of a model against the training set's statistics) or 'reconstruction' (images through a
    tokenizer against the same images, rFID).
    """
    recorded, drawn = reference.statistics is not None, task == "generation"
    validation = reference.count == PUBLISHED_SAMPLES or "val" in re.split(r"[-_.]", reference.path.stem.lower())
    balance = class_balance(samples) if drawn else None
    traps = {
        f"REF and SAMPLES are both {samples.path}: the figures are of a set against itself": (
            reference.path.exists() and samples.path.exists() and reference.path.samefile(samples.path)
        ),
        f"{samples.path} has recorded statistics, as a reference has: REF comes first on the command line, then SAMPLES": (
            samples.statistics is not None
        ),
        f"{samples.count:,} reconstructions for {reference.count:,} reference images: rFID compares the same images before "
        "and after the tokenizer": not drawn and reference.count and samples.count != reference.count,
        f"{reference.path} has statistics of its own, as references of generated samples have; rFID is against the images "
        "that were encoded (val_ddp.py writes them)": not drawn and recorded,
        f"the reference has {reference.count:,} images; published rFID is over the {PUBLISHED_SAMPLES:,} of ImageNet's "
        "validation set": not drawn and reference.count != PUBLISHED_SAMPLES,
        f"{samples.count:,} samples; published figures are of {PUBLISHED_SAMPLES:,}, and FID falls with the number of "
        "samples": drawn and samples.count != PUBLISHED_SAMPLES,
        f"{reference.path} has {reference.count:,} images and no recorded statistics: "
        f"{'it looks like the validation set; ' * validation}published figures are against statistics of the training set "
        "(VIRTUAL_imagenet256_labeled.npz)": drawn and not recorded,
        f"the samples' classes are unbalanced: {balance}, more than chance gives": balance is not None,
        f"{reference.path} has no images: precision and recall are left out": (
            not reference.count and reference.features is None
        ),
        f"the samples are {_size(samples)} and the reference {_size(reference)}: each is resized by the graph on its own; "
        "sample_c2i_ddp.py --image-size-eval resizes as published": reference.size not in (None, samples.size),
        f"the samples are {_size(samples)}; published figures are of {PUBLISHED_SIZE[0]}x{PUBLISHED_SIZE[1]}": (
            reference.size in (None, samples.size) and samples.size != PUBLISHED_SIZE
        ),
    }
    return (
        [text for text, found in traps.items() if found]
        + lossy_files(reference, "reference")
        + lossy_files(samples, "samples")
    )


def lossy_files(images: ImageSet, name: str) -> list[str]:
    """Return a warning where files of a set are compressed."""
    text = f"{images.lossy:,} of the {images.count:,} files of the {name} are JPEG, WebP or AVIF: compression alone changes FID; use PNG"
    return [text] if images.lossy else []


class Inspection:
    """Findings that need the pixels: copies, and JPEG's quantised blocks in images that are no JPEG files.

    for batch in ...: inspection.look(batch)
    warnings = inspection.warnings("samples")
    """

    def __init__(self):
        self.hashes: list[int] = []
        self.examined = self.quantised = 0

    def look(self, images: np.ndarray) -> None:
        """Take in a batch, uint8 (n, H, W, 3); the first four are examined for blocks."""
        self.hashes += [zlib.crc32(image.tobytes()) << 32 | zlib.adler32(image.tobytes()) for image in images]
        self.examined += len(images[:4])
        self.quantised += sum(map(was_jpeg, images[:4]))

    def merge(self, other: "Inspection") -> None:
        """Add what another process has seen."""
        self.hashes += other.hashes
        self.examined += other.examined
        self.quantised += other.quantised

    def warnings(self, name: str, lossy: int = 0) -> list[str]:
        """Return what is to be said of the set called `name`, of which `lossy` files are known to be compressed."""
        copies = len(self.hashes) - len(set(self.hashes))
        found = []
        if copies:
            found.append(
                f"{copies:,} of the {len(self.hashes):,} {name} are exact copies of others: were several processes given "
                "the same seed?"
            )
        if not lossy and self.quantised > self.examined / 2:
            found.append(
                f"{self.quantised:,} of {self.examined:,} {name} that were examined have the quantised 8x8 blocks of JPEG: "
                "compression alone changes FID; save PNG"
            )
        return found


def same_images(reference: Inspection | None, samples: Inspection, fid: float, scale: float) -> list[str]:
    """Return a warning where samples are compared with themselves.

    Args:
        reference: what the reference's pixels showed, None where only its statistics are there.
        samples: the same of the samples.
        fid: their distance, which alone tells where the reference has no pixels.
        scale: sum of the variances of both sets, what an FID of zero is rounded by.
    """
    others = set(reference.hashes) if reference else set()
    shared = sum(value in others for value in samples.hashes)
    if shared:
        count = f"{shared:,} of the {len(samples.hashes):,} samples are exact copies of images of the reference"
        return [f"{count}: compared with themselves they look better than they are"]
    itself = f"FID is {fid:.2g}: the statistics of the reference were made of these samples, and say nothing of them"
    return [itself] if fid < _SAME * scale else []


def was_jpeg(image: np.ndarray) -> bool:
    """Return whether an image, uint8 (H, W, 3), was decoded from JPEG and not resized or cropped since.

    JPEG rounds each frequency of its 8x8 blocks to multiples of a step: most of nine low frequencies then stand at such
    multiples, up to quality 90 or so. Steps at the borders of blocks, as a tokenizer with 8-pixel tokens has too, do not
    count. Images below 64 pixels a side have too few.
    """
    height, width = (length // 8 * 8 for length in image.shape[:2])
    blocks = image[:height, :width].reshape(height // 8, 8, width // 8, 8, 3).swapaxes(1, 2).reshape(-1, 8, 8, 3)
    whole = blocks[((blocks > 0) & (blocks < 255)).all(axis=(1, 2, 3))]  # values that were cut off are no multiples
    luma = whole.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    frequencies = dctn(luma, axes=(1, 2), norm="ortho")
    fits = []
    for u, v in _FREQUENCIES:
        values = frequencies[:, u, v, None]  # (blocks, 1), against all steps
        used = np.abs(values) > _STEPS / 2
        enough = (used.sum(0) >= 32) & ((np.abs(values) > 1.5 * _STEPS).sum(0) >= 4)
        fit = (np.cos(2 * np.pi * values / _STEPS) * used).sum(0) / used.sum(0).clip(1)
        fits.append(np.where(enough, fit, 0).max())
    return bool(sorted(fits)[2] > _QUANTISED)


def class_balance(samples: ImageSet) -> str | None:
    """Return how unevenly the labels are spread if chance would not: by Pearson's test, and the rarest and commonest class."""
    if samples.labels is None:
        return None
    counts = np.bincount(samples.labels - min(samples.labels.min(), 0))
    classes = len(counts)
    expected = counts.sum() / classes
    if classes < 2 or expected < 5:
        return None
    chances = (
        chi2.sf(((counts - expected) ** 2).sum() / expected, classes - 1),
        classes * binom.cdf(counts.min(), counts.sum(), 1 / classes),
        classes * binom.sf(counts.max() - 1, counts.sum(), 1 / classes),
    )
    text = f"from {counts.min():,} to {counts.max():,} images of each of {classes} classes"
    return text if min(chances) < _IMPROBABLE else None


def _size(images: ImageSet) -> str:
    return "unknown" if images.size is None else f"{images.size[1]}x{images.size[0]}"
