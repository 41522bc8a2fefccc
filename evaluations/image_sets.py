"""The images an evaluator is given: an `.npz` read piece by piece, or a folder. Never all of them in memory.

images = open_images("samples/GPT-B-c2i_B_256.npz")
for batch in images.batches(0, images.count, 64): ...       # uint8 (n, H, W, 3), in order
"""

import json
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from dataset.folders import find_images
from dataset.pixels import DEFAULT, LOSSY_EXTENSIONS, Reading, load_rgb
from evaluations.metrics import Statistics
from utils.files import atomic_write, content_of, require_regular

# Of pool features, and of the spatial ones of sFID.
STATISTICS = (("mu", "sigma"), ("mu_s", "sigma_s"))
_SMALL = {"arr_1", "pool", "count", "protocol", *sum(STATISTICS, ())}
_DAMAGED = (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
_THREADS = 8


class ImageSet:
    """Images of one size, in an order, and what is known of them.

    path: where they are. kind: 'npz', 'statistics' (an .npz with figures recorded over a larger set) or 'folder'.
    count: images to read, 0 where only statistics are there. size: (height, width). labels: int64 (count,), or None.
    statistics: of pool features, and of spatial ones where the file has them; None without. features: pool features
    (n, D) recorded with these, which stand for images, where the file has them. made: settings that the statistics were
    made with, where the file says them. lossy: images in JPEG files or other lossy formats. reading: how files become
    pixels, None where there are none.
    """

    path: Path
    kind: str
    count: int
    size: tuple[int, int] | None = None
    labels: np.ndarray | None = None
    statistics: list[Statistics] | None = None
    features: np.ndarray | None = None
    made: dict | None = None
    lossy: int = 0
    reading: Reading | None = None

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Return images start … stop - 1 in order, uint8 (n, H, W, 3) with n up to batch_size. Raises ValueError for damage."""
        raise NotImplementedError

    def require_made_with(self, **wanted: object) -> None:
        """Raise ValueError where recorded statistics were made with another value of one of these settings."""
        for name, value in wanted.items():
            made = (self.made or {}).get(name, value)
            if made != value:
                other = f"{self.path} was made with {name} {made}, this evaluation has {value}"
                raise ValueError(f"{other}: make it again from the images, or change the flag")

    def describe(self) -> dict:
        """Describe the set for a report, in JSON values."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "count": self.count,
            "size": self.size and list(self.size),
            "classes": None if self.labels is None else len(np.unique(self.labels)),
            "lossy_files": self.lossy,
            "reading": self.reading and self.reading.record(),
            "statistics": self.statistics and [one.count for one in self.statistics],
            "made": self.made,
            "content": content_of(self.path),
        }

    def line(self) -> str:
        """Describe the set for a reader."""
        parts = [f"{self.count:,} images, {self.size[1]}x{self.size[0]}"] if self.count else []
        parts += [f"{len(set(self.labels.tolist())):,} classes"] if self.labels is not None else []
        parts += ["recorded statistics"] if self.statistics else []
        return f"{self.path}, {', '.join(parts)}"


def open_images(path: str | Path, reading: Reading = DEFAULT) -> ImageSet:
    """Return the images at a path, once it is clear that they can be used; files of a folder are read as `reading` says.

    Raises FileNotFoundError (nothing there), ValueError (no .npz or damaged, no arr_0, another dtype or shape than uint8
    (N, H, W, 3), an empty folder, images of different sizes).
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}: give an .npz of images (arr_0), or a folder of them")
    if path.is_dir():
        return ImageFolder(path, find_images(path), reading)
    require_regular(path)
    return NpzImages(path)


class NpzImages(ImageSet):
    """`arr_0` of an archive, read forward as the archive's other entries are not; `arr_1` are labels."""

    def __init__(self, path: Path):
        self.path, self.kind, self.count = path, "npz", 0
        try:
            with zipfile.ZipFile(path) as archive:
                held = [name.removesuffix(".npy") for name in archive.namelist()]
                if "arr_0" in held:
                    with archive.open("arr_0.npy") as f:
                        shape, fortran, dtype = _npy_header(f)
            with np.load(path, allow_pickle=False) as arrays:
                small = {name: arrays[name] for name in held if name in _SMALL}
        except _DAMAGED as error:
            size = path.stat().st_size
            raise ValueError(
                f"{path} is not a whole .npz ({error}; {size:,} bytes): write or download it again"
            ) from error
        if "arr_0" in held:
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
                order = " in Fortran order" if fortran else ""
                raise ValueError(
                    f"{path}: arr_0 is {dtype} {shape}{order}, expected uint8 (N, H, W, 3) in C order, 0 to 255"
                )
            self.count, self.size = shape[0], tuple(shape[1:3])
        labels = small.get("arr_1")
        if labels is not None and labels.dtype.kind in "iu" and labels.shape == (self.count,):  # else another array
            self.labels = labels.astype(np.int64)
        pairs = [pair for pair in STATISTICS if set(pair) <= small.keys()]
        if pairs:
            self.kind, self.features, self.made = "statistics", small.get("pool"), small.get("protocol")
            self.made = None if self.made is None else json.loads(str(self.made))
            self.statistics = [self._statistics(small, *pair) for pair in pairs]
        if not self.count and not pairs:
            raise ValueError(
                f"{path} has no arr_0 with images, nor statistics mu and sigma; it holds {', '.join(held)}. "
                "sample_c2i_ddp.py writes such files, as does numpy.savez(path, images)"
            )

    def _statistics(self, arrays: dict[str, np.ndarray], mean: str, covariance: str) -> Statistics:
        mu, sigma = arrays[mean], arrays[covariance]
        fit = mu.dtype.kind == sigma.dtype.kind == "f" and mu.ndim == 1 and sigma.shape == 2 * mu.shape
        if not fit or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            what = f"{self.path}: {mean}, {covariance} are {mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}"
            raise ValueError(f"{what}, expected finite floats (D,) and (D, D)")
        count = int(arrays["count"]) if "count" in arrays else None
        return Statistics(mu.astype(np.float64), sigma.astype(np.float64), count)

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
    """Files of a folder in the order given; class folders give labels.

    resolution: each image is cut to its centre square and resized to as many pixels a side (None: images have one size).
    `sizes` then counts what the files are, (width, height). `total`: how many images there are to choose from.
    Raises ValueError for no files, or one that is no image.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        reading: Reading = DEFAULT,
        resolution: int | None = None,
        total: int = 0,
    ):
        self.path, self.kind, self.reading, self.resolution = path, "folder", reading, resolution
        self.names, self.count, self.total = list(names), len(names), total or len(names)
        if not names:
            raise ValueError(f"the folder {path} has no images: check the path")
        self.lossy = sum(name.lower().endswith(LOSSY_EXTENSIONS) for name in names)
        folders = [name.split("/")[0] if "/" in name else None for name in names]
        if None not in folders and len(set(folders)) > 1:
            self.labels = np.unique(folders, return_inverse=True)[1].astype(np.int64)
        if resolution is None:
            self.size = self._read(names[0]).shape[:2]
        else:
            self.size = (resolution, resolution)
            with ThreadPoolExecutor(_THREADS) as threads:
                self.sizes = Counter(threads.map(self._stored_size, names))

    def describe(self) -> dict:
        if self.resolution is None:
            return super().describe()
        common = {f"{width}x{height}": count for (width, height), count in self.sizes.most_common(8)}
        return {**super().describe(), "stored_sizes": common, "different_sizes": len(self.sizes)}

    def _stored_size(self, name: str) -> tuple[int, int]:
        """Return width and height, from the file's header alone."""
        try:
            with Image.open(self.path / name) as image:
                return image.size
        except Exception as error:  # decoders fail in arbitrary ways
            raise self._unreadable(name, error) from error

    def _read(self, name: str) -> np.ndarray:
        try:
            image = load_rgb(self.path / name, self.reading)
        except Exception as error:
            raise self._unreadable(name, error) from error
        if self.resolution is not None:
            return np.asarray(square(image, self.resolution))
        if self.size is not None and image.size[::-1] != self.size:
            raise ValueError(
                f"{self.path / name} has {image.width}x{image.height} pixels, {self.path / self.names[0]} "
                f"{self.size[1]}x{self.size[0]}: the images of a set have one size"
            )
        return np.asarray(image)

    def _unreadable(self, name: str, error: Exception) -> ValueError:
        return ValueError(f"{self.path / name} is not a readable image ({error}): remove it or write it again")

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """See ImageSet.batches. Files are decoded by a few threads, up to a batch ahead."""
        with ThreadPoolExecutor(_THREADS) as threads:
            waiting = deque()
            names = iter(self.names[start:stop])
            try:
                for place in range(start, stop, batch_size):
                    for _, name in zip(range(2 * batch_size - len(waiting)), names):
                        waiting.append(threads.submit(self._read, name))
                    yield np.stack([waiting.popleft().result() for _ in range(min(batch_size, stop - place))])
            finally:
                for future in waiting:
                    future.cancel()


def square(image: Image.Image, resolution: int) -> Image.Image:
    """Return the centre square of an image, by Pillow's Lanczos filter at `resolution` pixels a side.

    A centre that falls between two pixels is rounded as torchvision's center_crop rounds it: half to even.
    """
    side = min(image.size)
    left, top = (round((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((resolution, resolution), Image.Resampling.LANCZOS)


def save_statistics(
    path: str | Path, statistics: Sequence[Statistics], rows: np.ndarray | None = None, made: dict | None = None
) -> None:
    """Write what NpzImages reads: statistics of pool features and of spatial ones, pool features, settings."""
    arrays = {
        name: value
        for pair, one in zip(STATISTICS, statistics)
        for name, value in zip(pair, (one.mean, one.covariance))
    }
    arrays |= {"count": statistics[0].count} if statistics[0].count else {}
    arrays |= {"pool": rows} if rows is not None else {}
    arrays |= {"protocol": json.dumps(made)} if made else {}
    with atomic_write(path) as f:
        np.savez(f, **arrays)


def _npy_header(f: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and dtype of an array in an archive, whose file then stands at the first value."""
    read = npy.read_array_header_1_0 if npy.read_magic(f) == (1, 0) else npy.read_array_header_2_0
    return read(f)
