"""Handwritten digits as the quickstart's tools know them: their words, how one leans and how heavy it is, and their judge."""

from pathlib import Path

import numpy as np
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

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


class Judge:
    """A classifier of digits, and features to compare sets in, both learned from make_digits.py's training digits."""

    def __init__(self, folder: str | Path):
        self.train_images, self.train_labels = read_digits(Path(folder) / "train")
        self.held_images, self.held_labels = read_digits(Path(folder) / "held_out")
        pixels = self._pixels(self.train_images)
        self.classifier = SVC(C=10, gamma="scale").fit(pixels, self.train_labels)
        self.perceptron = MLPClassifier((64,), max_iter=500, random_state=0).fit(pixels, self.train_labels)

    def figures(self, samples: np.ndarray, asked: np.ndarray) -> dict:
        """Return the figures of samples, uint8 (n, H, W, 3), that should be the digits `asked` (n,)."""
        held_out = self.classifier.score(self._pixels(self.held_images), self.held_labels)
        return {
            "samples": len(samples),
            "samples_read_as_asked": float(self.classifier.score(self._pixels(samples), asked)),
            "held_out_digits_read_right": float(held_out),
            "train_against_held_out": self._distances(self.held_images),
            "train_against_samples": self._distances(samples),
        }

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        return images[..., 0].reshape(len(images), -1) / 255.0

    def _features(self, images: np.ndarray) -> np.ndarray:
        return (self._pixels(images) @ self.perceptron.coefs_[0] + self.perceptron.intercepts_[0]).clip(0)

    def _distances(self, images: np.ndarray) -> dict[str, float]:
        """Return how far a set of images is from the training digits."""
        from evaluations.metrics import Statistics, frechet_distance, precision_recall

        features = [self._features(part) for part in (self.train_images, images)]
        distance = frechet_distance(*(Statistics(part.mean(0), np.cov(part, rowvar=False)) for part in features))
        precision, recall = precision_recall(*features)
        return {"frechet_distance": distance, "precision": precision, "recall": recall}
