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
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from dataset.folders import find_images
from dataset.pixels import DEFAULT, LOSSY_EXTENSIONS, Reading, load_rgb
from utils.files import require_regular

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
FEATURES = "pool"
_CHUNK = 1 << 24
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
        """Images start … stop - 1 in order, uint8 (n, H, W, 3) with n up to batch_size. Raises ValueError for damage."""

    def describe(self) -> dict:
        """What a report says of the set, JSON values."""
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
        }


def open_images(path: str | Path, reading: Reading = DEFAULT) -> ImageSet:
    """The images at a path, once it is clear that they can be used; files of a folder are read as `reading` says.

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
                members = {name.removesuffix(".npy"): archive.getinfo(name) for name in archive.namelist()}
                if all(name in members for name in STATISTICS):
                    self.kind = "statistics"
                    self.statistics = {name: _small_array(archive, members[name], path) for name in STATISTICS}
                    if FEATURES in members:
                        self.features = _small_array(archive, members[FEATURES], path, np.float32)
                if "arr_0" in members:
                    self._read_header(archive, members["arr_0"])
                if "arr_1" in members and self.count:
                    self.labels = self._read_labels(archive, members["arr_1"])
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ValueError(
                f"{path} is not a whole .npz ({error}; {path.stat().st_size:,} bytes): truncated or another kind of "
                "file. Write, copy or download it again"
            ) from error
        if not self.count and self.statistics is None:
            held = ", ".join(members) or "nothing"
            raise ValueError(
                f"{path} has no arr_0 with images, nor statistics ({', '.join(STATISTICS)}); it holds {held}. "
                "sample_c2i_ddp.py writes such files, as does numpy.savez(path, images)"
            )

    def _read_header(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        with archive.open(member) as f:
            shape, fortran, dtype = _npy_header(f, self.path, "arr_0")
        wanted = "uint8 (N, H, W, 3), values 0 to 255"
        if dtype != np.uint8:
            hint = "(images * 255).round().astype('uint8') if they are in [0, 1]" if dtype.kind == "f" else "uint8"
            raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}, expected {wanted}: save it as {hint}")
        if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
            raise ValueError(
                f"{self.path}: arr_0 is {shape}, channels first; expected {wanted}: save images.transpose(0, 2, 3, 1)"
            )
        if len(shape) != 4 or shape[3] != 3 or 0 in shape[1:3]:
            raise ValueError(f"{self.path}: arr_0 is {shape}, expected {wanted}")
        if fortran:
            raise ValueError(f"{self.path}: arr_0 is in Fortran order: save numpy.ascontiguousarray(images)")
        if not shape[0]:
            raise ValueError(f"{self.path}: arr_0 is {shape}, without a single image")
        self._member, self.count, self.size = member.filename, shape[0], tuple(shape[1:3])

    def _read_labels(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray | None:
        labels = _small_array(archive, member, self.path, None)
        if labels.dtype.kind not in "iu" or labels.shape != (self.count,):
            return None  # something else under that name
        return labels.astype(np.int64)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """See ImageSet.batches. From image 0 to the last the archive's checksum is compared too."""
        image_bytes = self.size[0] * self.size[1] * 3
        try:
            with ExitStack() as open_files:
                f = self._open_at(start * image_bytes, open_files)
                for place in range(start, stop, batch_size):
                    count = min(batch_size, stop - place)
                    data = _read_exactly(f, count * image_bytes)
                    if place + count == self.count:
                        f.read(1)  # past the end, where zipfile compares the checksum
                    yield np.frombuffer(data, np.uint8).reshape(count, *self.size, 3)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): write, copy or download it again") from error

    def _open_at(self, distance: int, open_files: ExitStack) -> IO[bytes]:
        """The array's values from byte `distance` on."""
        archive = open_files.enter_context(zipfile.ZipFile(self.path))
        f = open_files.enter_context(archive.open(self._member))
        _npy_header(f, self.path, "arr_0")
        info = archive.getinfo(self._member)
        if distance and info.compress_type == zipfile.ZIP_STORED:
            position = _data_offset(self.path, info) + f.tell() + distance
            f = open_files.enter_context(self.path.open("rb"))
            f.seek(position)
            return f
        while distance:  # what is compressed has to be read through
            distance -= len(_read_exactly(f, min(distance, _CHUNK)))
        return f


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


def _npy_header(f: IO[bytes], path: Path, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an array in an archive, whose file then stands at the first value."""
    try:
        version = npy.read_magic(f)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return read(f)
    except ValueError as error:
        raise ValueError(f"{path}: {name} is not an array of numpy.savez ({error})") from error


def _small_array(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, dtype: type | None = np.float64
) -> np.ndarray:
    """A whole array, of plain numbers only."""
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as f:
        try:
            array = npy.read_array(f, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path}: {name} is damaged or not an array of numbers ({error})") from error
    if dtype is None:
        return array
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {name} is {array.dtype}, expected numbers")
    return array.astype(dtype)


def _read_exactly(f: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    view, missing = memoryview(data), size
    while missing:
        count = f.readinto(view[size - missing :])
        if not count:
            raise EOFError(f"{missing:,} bytes are missing at its end")
        missing -= count
    return data


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's content begins: after its local header, whose two last lengths are its own."""
    with open(path, "rb") as f:
        f.seek(info.header_offset + 26)
        name, extra = (int.from_bytes(f.read(2), "little") for _ in range(2))
    return info.header_offset + 30 + name + extra
