"""The images of a text-to-image evaluation: any size, each cut to its centre square and resized to one size.

images = generated_images("samples_parti/…/images", resolution=256, limit=30000)
for batch in images.batches(0, images.count, 64): ...       # uint8 (n, 256, 256, 3), in natural order
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.folders import find_images, natural_key
from dataset.pixels import DEFAULT, LOSSY_EXTENSIONS, Reading, load_rgb
from evaluations.image_sets import ImageFolder

_THREADS = 8


class SquareImages(ImageFolder):
    """Files of a folder in the order given, as squares of `resolution` pixels.

    `sizes` counts what the files are, (width, height); `total` is how many images their folder has. Raises ValueError for
    no files, or one that is no image.
    """

    def __init__(self, path: Path, names: Sequence[str], resolution: int, reading: Reading = DEFAULT):
        if not names:
            raise ValueError(f"the folder {path} has no images: check the path")
        self.reading = reading
        self.path, self.kind, self._names, self.count = path, "folder", list(names), len(names)
        self.total = self.count
        self.size = (resolution, resolution)
        self.lossy = sum(name.lower().endswith(LOSSY_EXTENSIONS) for name in self._names)
        with ThreadPoolExecutor(_THREADS) as threads:
            self.sizes = Counter(threads.map(self._stored_size, self._names))

    def _stored_size(self, name: str) -> tuple[int, int]:
        """Width and height, from the file's header alone."""
        try:
            with Image.open(self.path / name) as image:
                return image.size
        except Exception as error:  # decoders fail in arbitrary ways
            raise _unreadable(self.path / name, error) from error

    def _read(self, name: str, size: tuple[int, int] | None = None) -> np.ndarray:
        try:
            image = load_rgb(self.path / name, self.reading)
        except Exception as error:
            raise _unreadable(self.path / name, error) from error
        return np.asarray(square(image, self.size[0]))

    @property
    def names(self) -> list[str]:
        """The files' names in order, relative to `path`."""
        return self._names

    @property
    def enlarged(self) -> int:
        """Count the files with a side shorter than the evaluated resolution."""
        return sum(count for size, count in self.sizes.items() if min(size) < self.size[0])

    def describe(self) -> dict:
        """See ImageSet.describe; `stored_sizes` are the files' commonest, 'WIDTHxHEIGHT' to count."""
        common = {f"{width}x{height}": count for (width, height), count in self.sizes.most_common(8)}
        return {**super().describe(), "stored_sizes": common, "different_sizes": len(self.sizes)}


def square(image: Image.Image, resolution: int) -> Image.Image:
    """Return the centre square of an image, by Pillow's Lanczos filter at `resolution` pixels a side.

    A centre that falls between two pixels is rounded as torchvision's center_crop rounds it: half to even.
    """
    side = min(image.size)
    left, top = (round((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((resolution, resolution), Image.Resampling.LANCZOS)


def generated_images(folder: str | Path, resolution: int, limit: int, reading: Reading = DEFAULT) -> SquareImages:
    """Return the first `limit` images directly in a folder, in natural order: 2.png before 10.png.

    Raises FileNotFoundError for no folder, ValueError for no images or an unreadable one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder of generated images at {folder}: --fake_dir is the folder that holds images/ and captions.txt, "
            "as sample_t2i_ddp.py writes it"
        )
    names = sorted((name for name in find_images(folder) if "/" not in name), key=natural_key)
    images = SquareImages(folder, names[:limit], resolution, reading)
    images.total = len(names)
    return images


def reference_images(folder: str | Path, resolution: int, reading: Reading = DEFAULT) -> SquareImages:
    """Return all images of a folder, at any depth. Raises FileNotFoundError, ValueError as `generated_images` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of reference images at {folder}: check --ref_dir")
    return SquareImages(folder, find_images(folder), resolution, reading)


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is not a readable image ({error}): remove it or write it again")
