"""Handwritten digits as the quickstart's tools know them: their words, how one leans and how heavy it is, folders of them."""

from pathlib import Path

import numpy as np

from dataset.folders import class_folders
from dataset.pixels import load_rgb

SLANTS = ("leaning left", "upright", "leaning right")
STROKES = ("thin", "medium", "bold")


def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of class folders, uint8 (n, H, W, 3), and their digits (n,)."""
    images = class_folders(folder)
    return np.stack([np.asarray(load_rgb(path)) for path in images.paths]), np.asarray(images.labels)


def measure(image: np.ndarray) -> tuple[float, float]:
    """Return slant and weight of a light digit on black, (H, W) from 0.

    The slant is how far its top is to the right of its foot, as the tangent of an angle; the weight the share of its pixels
    that are brighter than half.
    """
    ink = np.asarray(image, np.float64)
    if not ink.any():
        return 0.0, 0.0
    y, x = np.indices(ink.shape)
    total = ink.sum()
    dy, dx = y - (ink * y).sum() / total, x - (ink * x).sum() / total
    upright = (ink * dy**2).sum()
    slant = -float((ink * dx * dy).sum() / upright) if upright else 0.0
    return slant, float((ink > 127).mean())


def attribute_limits(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the values that part each digit's images (n, H, W) into thirds: (10, 2, 2), for digit, slant or weight, lower or upper."""
    values = np.asarray([measure(image) for image in images])
    return np.stack([np.quantile(values[labels == digit], (1 / 3, 2 / 3), axis=0).T for digit in range(10)])


def attributes(image: np.ndarray, digit: int, limits: np.ndarray) -> tuple[str, str]:
    """Return one of SLANTS and one of STROKES: in which third of its kind a digit is."""
    slant, stroke = (int((value > pair).sum()) for value, pair in zip(measure(image), limits[digit], strict=True))
    return SLANTS[slant], STROKES[stroke]
