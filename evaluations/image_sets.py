"""The images an evaluator is given: an `.npz` read piece by piece, or a folder. Never all of them in memory.

images = open_images("samples/GPT-B-c2i_B_256.npz")
for batch in images.batches(0, images.count, 64): ...       # uint8 (n, H, W, 3), in order
"""

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from dataset.folders import find_images
from dataset.pixels import DEFAULT, LOSSY_EXTENSIONS, Reading, load_rgb
from utils.files import require_regular
from utils.sample_folder import content_of

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
FEATURES = "pool"
_THREADS = 8


class ImageSet(ABC):
    """Images of one size, in an order, and what is known of them.

    path: where they are. kind: 'npz', 'statistics' (an .npz with figures recorded over a larger set) or 'folder'.
    count: images to read, 0 where only statistics are there. size: (height, width). labels: int64 (count,), or None.
    statistics: the arrays called mu, sigma, mu_s, sigma_s, float64, where the file has them. features: pool features
    (n, D) recorded with these, which stand for images, where the file has them. lossy: images in JPEG files or other
    lossy formats. reading: how files become pixels, None where there are none.
    """

    path: Path
    kind: str
    count: int
    size: tuple[int, int] | None
    labels: np.ndarray | None = None
    statistics: dict[str, np.ndarray] | None = None
    features: np.ndarray | None = None
    lossy: int = 0
    reading: Reading | None = None

    @abstractmethod
    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Return images start … stop - 1 in order, uint8 (n, H, W, 3) with n up to batch_size. Raises ValueError for damage."""

    def describe(self) -> dict:
        """Describe the set for a report, in JSON values."""
        size = None if self.size is None else list(self.size)
        return {
            "path": str(self.path),
            "kind": self.kind,
            "count": self.count,
            "size": size,
            "dtype": "uint8" if self.count else None,
            "classes": None if self.labels is None else len(np.unique(self.labels)),
            "lossy_files": self.lossy,
            "reading": self.reading and self.reading.record(),
            "recorded_statistics": sorted(self.statistics or ()),
            "content": content_of(self.path),
        }


def open_images(path: str | Path, reading: Reading = DEFAULT) -> ImageSet:
    """Return the images at a path, once it is clear that they can be used; files of a folder are read as `reading` says.

    Raises FileNotFoundError (nothing there), ValueError (no .npz or damaged, no arr_0, another dtype or shape than uint8
    (N, H, W, 3), an empty folder, images of different sizes).
    """
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path, reading)
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}: give an .npz of images or statistics, or a folder of images")
    require_regular(path)
    return ImageArchive(path)


class ImageArchive(ImageSet):
    """An `.npz` with `arr_0`, uint8 (N, H, W, 3), perhaps labels `arr_1`, perhaps statistics."""

    def __init__(self, path: Path):
        self.path, self.kind, self.count, self.size = path, "npz", 0, None
        try:
            with zipfile.ZipFile(path) as archive:
                held = [name.removesuffix(".npy") for name in archive.namelist()]
                if "arr_0" in held:
                    with archive.open("arr_0.npy") as f:
                        self._check(*_npy_header(f))
            with np.load(path, allow_pickle=False) as arrays:
                if set(STATISTICS) <= set(held):
                    self.kind = "statistics"
                    self.statistics = {name: np.asarray(arrays[name], np.float64) for name in STATISTICS}
                    self.features = arrays[FEATURES].astype(np.float32) if FEATURES in held else None
                if "arr_1" in held and self.count:
                    labels = arrays["arr_1"]
                    if labels.dtype.kind in "iu" and labels.shape == (self.count,):  # else something else of that name
                        self.labels = labels.astype(np.int64)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            size = path.stat().st_size
            raise ValueError(
                f"{path} is not a whole .npz ({error}; {size:,} bytes): write, copy or download it again"
            ) from error
        if not self.count and self.statistics is None:
            raise ValueError(
                f"{path} has no arr_0 with images, nor statistics ({', '.join(STATISTICS)}); it holds {', '.join(held)}. "
                "sample_c2i_ddp.py writes such files, as does numpy.savez(path, images)"
            )

    def _check(self, shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> None:
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
            order = " in Fortran order" if fortran else ""
            raise ValueError(
                f"{self.path}: arr_0 is {dtype} {shape}{order}, expected uint8 (N, H, W, 3), values 0 to 255, in C order"
            )
        self.count, self.size = shape[0], tuple(shape[1:3])

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """See ImageSet.batches. From image 0 to the last the archive's checksum is compared too."""
        image_bytes = self.size[0] * self.size[1] * 3
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as f:
                _npy_header(f)
                f.seek(start * image_bytes, 1)
                for place in range(start, stop, batch_size):
                    count = min(batch_size, stop - place)
                    data = bytearray(f.read(count * image_bytes))
                    if len(data) < count * image_bytes:
                        raise EOFError(f"it ends in image {place + len(data) // image_bytes}")
                    yield np.frombuffer(data, np.uint8).reshape(count, *self.size, 3)
                    if place + count == self.count:
                        f.read(1)  # past the end, where zipfile compares the checksum
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): write, copy or download it again") from error


class ImageFolder(ImageSet):
    """Images of a folder at any depth, ordered by folder and name; class folders give labels."""

    def __init__(self, path: Path, reading: Reading = DEFAULT):
        self.path, self.kind, self.reading = path, "folder", reading
        self._names = find_images(path)
        self.count = len(self._names)
        if not self.count:
            raise ValueError(f"the folder {path} has no images")
        self.lossy = sum(name.lower().endswith(LOSSY_EXTENSIONS) for name in self._names)
        folders = [name.split("/")[0] if "/" in name else None for name in self._names]
        classes = sorted(set(folders) - {None})
        if None not in folders and len(classes) > 1:
            numbers = {name: number for number, name in enumerate(classes)}
            self.labels = np.asarray([numbers[name] for name in folders], np.int64)
        self.size = self._read(self._names[0]).shape[:2]

    def _read(self, name: str, size: tuple[int, int] | None = None) -> np.ndarray:
        file = self.path / name
        try:
            image = np.asarray(load_rgb(file, self.reading))
        except Exception as error:  # decoders fail in arbitrary ways
            raise ValueError(f"{file} is not a readable image ({error}): remove it or write it again") from error
        if size is not None and image.shape[:2] != size:
            raise ValueError(
                f"{file} is {image.shape[0]} high and {image.shape[1]} wide, {self.path / self._names[0]} is {size[0]} "
                f"high and {size[1]} wide: the images of a set have one size"
            )
        return image

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """See ImageSet.batches. Files are decoded by a few threads, up to a batch ahead."""
        with ThreadPoolExecutor(_THREADS) as threads:
            read = partial(threads.submit, self._read, size=self.size)
            names = iter(self._names[start:stop])
            waiting = deque(read(name) for _, name in zip(range(2 * batch_size), names))
            try:
                for place in range(start, stop, batch_size):
                    images = []
                    for _ in range(min(batch_size, stop - place)):
                        images.append(waiting.popleft().result())
                        waiting.extend(read(name) for _, name in zip(range(1), names))
                    yield np.stack(images)
            finally:
                for future in waiting:
                    future.cancel()


def _npy_header(f: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and dtype of an array in an archive, whose file then stands at the first value."""
    read = npy.read_array_header_1_0 if npy.read_magic(f) == (1, 0) else npy.read_array_header_2_0
    return read(f)
