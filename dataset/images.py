"""Images as training items: reading, reproducible augmentation, and what happens where a file cannot be read.

    images = class_folders("imagenet/train")                                    # dataset/folders.py
    data = ImageDataset(images, partial(random_view, image_size=256), seed=0)
    data.set_epoch(3)
    pixels, label = data[0]                                                     # (3, 256, 256) in [-1, 1], int

Every random choice of an item is a function of (seed, epoch, index): workers, ranks and restarts do not change it.
"""

import bisect
import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from dataset.augmentation import UnusableImage
from dataset.pixels import DEFAULT, Reading, load_rgb
from utils.loading import load
from utils.rng import item_seed

logger = logging.getLogger(__name__)

TRIES = 20


class PathList(Sequence[str]):
    """Paths below one folder, kept as one buffer of bytes.

    A list of a million strings would be copied into every worker process by its reference counts alone.
    """

    def __init__(self, folder: str | os.PathLike, relative: Iterable[str]):
        self.folder = os.fspath(folder)
        encoded = [os.fsencode(path) for path in relative]
        self._ends = np.fromiter(accumulate(map(len, encoded)), np.int64, len(encoded))
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.folder, self._relative(index))

    def relative(self) -> list[str]:
        """Return the paths as they were given."""
        return [self._relative(index) for index in range(len(self))]

    def update(self, digest: "hashlib._Hash") -> None:
        """Add the relative paths to a digest."""
        digest.update(self._ends.tobytes())
        digest.update(self._bytes.tobytes())

    def _relative(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class _Joined(Sequence[str]):
    def __init__(self, *parts: Sequence[str]):
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> str:
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]

    def update(self, digest: "hashlib._Hash") -> None:
        for part in self.parts:
            part.update(digest)


@dataclass
class ImageList:
    """Paths of images, and their labels: int64 (n,), or None where all are 0."""

    paths: Sequence[str]
    labels: np.ndarray | None = None
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self) -> str:
        """Return 16 digits that change with the images' relative paths, their order and their labels."""
        digest = hashlib.sha256()
        self.paths.update(digest)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def label(self, index: int) -> int:
        return 0 if self.labels is None else int(self.labels[index])

    def __add__(self, other: "ImageList") -> "ImageList":
        """Return these images, then the other ones; those of a list without labels get label 0. Keeps these classes."""
        labels = None
        if self.labels is not None or other.labels is not None:
            labels = np.concatenate(
                [np.zeros(len(part), np.int64) if part.labels is None else part.labels for part in (self, other)]
            )
        return ImageList(_Joined(self.paths, other.paths), labels, self.classes)


class ImageDataset(Dataset):
    """Items (transform(image), label int) of an ImageList; `transform` takes an RGB PIL image, read as `reading` says.

    A file that cannot be read is logged once, counted in `skipped` (over all workers), and
    - `unreadable="replace"` (training): another image drawn from (seed, epoch, index) takes its place;
    - `unreadable="omit"` (extraction): items are (transform(image), label, index), and None for such a file;
      `present_batches` makes batches of them.
    ValueError with the paths where 20 images in a row cannot be read.
    """

    def __init__(
        self,
        images: ImageList,
        transform: Callable[[Image.Image], Any],
        seed: int = 0,
        unreadable: Literal["replace", "omit"] = "replace",
        reading: Reading = DEFAULT,
    ):
        if unreadable not in ("replace", "omit"):
            raise ValueError(f"unreadable must be 'replace' or 'omit', got {unreadable!r}")
        self.images = images
        self.transform = transform
        self.seed = seed
        self.unreadable = unreadable
        self.reading = reading
        # Shared memory: persistent workers see a new epoch, and the main process sees what workers skipped. A byte per
        # image instead of a counter: no lock, and an image met twice counts once.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros(len(images), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> list[str]:
        """Return class names in the order of their labels; empty where the images have no classes."""
        return self.images.classes

    @property
    def skipped(self) -> int:
        """Return how many images were found unreadable so far, in this process and its workers."""
        return int(self._skipped.count_nonzero())

    @property
    def skipped_indices(self) -> list[int]:
        """Return the indices of the images found unreadable so far, ascending."""
        return self._skipped.nonzero().flatten().tolist()

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and flips in the next pass; reaches running workers too."""
        self._epoch[0] = epoch

    def __getitem__(self, index: int) -> tuple | None:
        index = range(len(self))[index]
        if self.unreadable == "omit":
            return self._item_or_none(index)
        tried: dict[int, str] = {}
        place = index
        for attempt in range(1, min(TRIES, len(self)) + 1):
            try:
                return self._read(place, index)
            except _Unreadable as error:
                tried[place] = str(error)
            place = item_seed(self.seed, self._current_epoch(), index, attempt) % len(self)
            while place in tried and len(tried) < len(self):
                place = (place + 1) % len(self)
        raise ValueError(_nothing_readable(list(tried.values())))

    def _item_or_none(self, index: int) -> tuple | None:
        try:
            return (*self._read(index, index), index)
        except _Unreadable:
            return None

    def require_readable(self, missing: Sequence[int]) -> None:
        """Raise ValueError with paths and reasons where the images `missing` in a row are too many for accidents.

        One bad file is an accident; a run of them is a disk that went away, and must not pass for an empty one.
        """
        if len(missing) < TRIES:
            return
        failures = []
        for index in missing:
            try:
                self._read(index, index)
            except _Unreadable as error:
                failures.append(str(error))
        raise ValueError(_nothing_readable(failures))

    def _read(self, place: int, index: int) -> tuple[Any, int]:
        """Return the image at `place`, augmented with the draws of `index`."""
        path = f"image {place}"
        try:
            path = self.images.paths[place]
            image = load_rgb(path, self.reading)
        except Exception as error:
            # For damaged files Pillow's decoders raise OSError, SyntaxError, struct.error, TypeError and more.
            raise self._skip(place, path, error) from error
        try:
            with drawing_from(item_seed(self.seed, self._current_epoch(), index)):
                return self.transform(image), self.images.label(place)
        except UnusableImage as error:
            raise self._skip(place, path, error) from error

    def _skip(self, place: int, path: str, error: Exception) -> "_Unreadable":
        reason = f"{type(error).__name__}: {error}"
        if not self._skipped[place]:
            self._skipped[place] = 1
            logger.warning("skipped unreadable image %s (%s); %d so far", path, reason, self.skipped)
        return _Unreadable(f"{path} ({reason})")

    def _current_epoch(self) -> int:
        return int(self._epoch[0])


class _Unreadable(Exception):
    pass


def _nothing_readable(failures: list[str]) -> str:
    listed = "\n  ".join(failures)
    return f"none of {len(failures)} images in a row could be read; is the disk there, are the files whole?\n  {listed}"


def collate_present(items: Sequence[tuple | None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Batch the items of an `unreadable="omit"` data set without its Nones.

    Returns pixels (n, ...) — (n, views, 3, H, W) where the transform gives a list of views —, labels (n,) and data set
    indices (n,), both int64; None where no item is left.
    """
    present = [item for item in items if item is not None]
    if not present:
        return None
    stacked = [(torch.stack(pixels) if isinstance(pixels, list) else pixels, *rest) for pixels, *rest in present]
    return tuple(default_collate(stacked))


class Omitting(Protocol):
    """A data set whose items are None for what cannot be used: `ImageDataset(unreadable="omit")`, PairViews."""

    def __len__(self) -> int: ...
    def require_readable(self, missing: Sequence[int]) -> None: ...


def present_batches(
    dataset: Omitting, batches: Sequence[Sequence[int]], workers: int, pin_memory: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
    """Yield what collate_present makes of the items of each batch of indices.

    Raises ValueError as `dataset.require_readable` does, which is asked about those that are missing in a row, in the
    order of the batches, whatever the number of loader processes.
    """
    missing: list[int] = []
    for indices, batch in zip(batches, load(dataset, batches, workers, collate_present, pin_memory), strict=True):
        present = set() if batch is None else set(batch[2].tolist())
        for index in indices:
            missing = [] if index in present else [*missing, index]
            dataset.require_readable(missing)
        yield batch


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Start Python's `random` and torch's CPU generator at `seed` inside; after it they continue as before."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
