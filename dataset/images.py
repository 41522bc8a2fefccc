"""Images as training items: reading, reproducible augmentation, and what happens where a file cannot be read.

    images = class_folders("imagenet/train")                                    # dataset/folders.py
    data = ImageDataset(images, partial(random_view, image_size=256), seed=0)
    data.set_epoch(3)
    pixels, label = data[0]                                                     # (3, 256, 256) in [-1, 1], int

Every random choice of an item is a function of (seed, epoch, index): workers, ranks and restarts do not change it.
"""

import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

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
_TOLD = 100  # unusable items that a process tells of one by one
_SHOWN = 5  # items that an error names


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
        return os.path.join(self.folder, self.relative(index))

    def relative(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())

    def update(self, digest: "hashlib._Hash") -> None:
        """Add the relative paths to a digest."""
        digest.update(self._ends.tobytes())
        digest.update(self._bytes.tobytes())


class _Joined(Sequence[str]):
    def __init__(self, *parts: Sequence[str]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> str:
        first, second = self.parts
        return first[index] if index < len(first) else second[index - len(first)]

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


class Unusable(Exception):
    """Reason why an item cannot be used."""


class ImageItems(Dataset):
    """Base of data sets that read images: draws from (seed, epoch, index), and an account of what cannot be used.

    Subclasses define `where(index)`, an item's place for messages, and `read(index)`, which raises Unusable.
    """

    kind, skipping = "images", "skipped unreadable image"

    def __init__(self, count: int, seed: int, reading: Reading, in_a_row: int = TRIES):
        self.count, self.seed, self.reading, self.in_a_row = count, seed, reading, in_a_row
        # Shared memory: persistent workers see a new epoch, and the main process sees what workers skipped. A byte per
        # item instead of a counter: no lock, and an item met twice counts once.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros(count, dtype=torch.uint8).share_memory_()
        self._told = 0

    def __len__(self) -> int:
        return self.count

    @property
    def skipped(self) -> int:
        """Return how many items were found unusable so far, in this process and its workers."""
        return int(self._skipped.count_nonzero())

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and flips in the next pass; reaches running workers too."""
        self._epoch[0] = epoch

    def pixels(self, open_file: Callable[[], Any], index: int, transform: Callable, smallest: int = 0) -> Any:
        """Return transform(image) of the file that `open_file` gives, with the draws of `index`. Raises Unusable."""
        try:
            image = load_rgb(open_file(), self.reading)
        except Exception as error:
            # For damaged files Pillow's decoders raise OSError, SyntaxError, struct.error, TypeError and more.
            raise Unusable(f"{type(error).__name__}: {error}") from error
        if min(image.size) < smallest:
            raise Unusable(f"{image.width}x{image.height} pixels, smaller than --image-size {smallest}")
        try:
            with drawing_from(item_seed(self.seed, self.epoch, index)):
                return transform(image)
        except UnusableImage as error:
            raise Unusable(f"UnusableImage: {error}") from error

    def skip(self, index: int, reason: Unusable) -> None:
        """Count an item that cannot be used, and log the first ones."""
        if self._skipped[index]:
            return
        self._skipped[index] = 1
        self._told += 1
        if self._told <= _TOLD:
            logger.warning("%s %s (%s); %d so far", self.skipping, self.where(index), reason, self.skipped)
        elif self._told == _TOLD + 1:
            logger.warning("what else cannot be used is not told one by one")

    def none_usable(self, what: str | None = None, indices: Sequence[int] | None = None) -> str:
        """Return the words of an error with a few of these unusable items, or of all, which are looked at once more."""
        indices = self._skipped.nonzero().flatten().tolist() if indices is None else indices
        what = what or f"none of {len(indices)} {self.kind} in a row could be used"
        reasons = [f"{what}; are the paths right, is the disk there? Some of them:"]
        for index in indices[-_SHOWN:]:
            try:
                self.read(index)
            except Unusable as error:
                reasons.append(f"{self.where(index)} ({error})")
        return "\n  ".join(reasons)


class ImageDataset(ImageItems):
    """Items (transform(image), label int) of an ImageList; `transform` takes an RGB PIL image, read as `reading` says.

    A file that cannot be read is logged once, counted in `skipped` (over all workers), and
    - `unreadable="replace"` (training): another image drawn from (seed, epoch, index) takes its place;
    - `unreadable="omit"` (extraction): items are (transform(image), label, index), and None for such a file;
      `present_batches` makes batches of them.
    ValueError with some of the paths where 20 images in a row cannot be read.
    """

    def __init__(
        self,
        images: ImageList,
        transform: Callable[[Image.Image], Any],
        seed: int = 0,
        unreadable: Literal["replace", "omit"] = "replace",
        reading: Reading = DEFAULT,
    ):
        super().__init__(len(images), seed, reading)
        self.images, self.transform, self.unreadable = images, transform, unreadable

    @property
    def classes(self) -> list[str]:
        """Return class names in the order of their labels; empty where the images have no classes."""
        return self.images.classes

    @property
    def skipped_indices(self) -> list[int]:
        """Return the indices of the images found unreadable so far, ascending."""
        return self._skipped.nonzero().flatten().tolist()

    def where(self, index: int) -> str:
        """Return the path of an image, or its number where the list is damaged there."""
        try:
            return self.images.paths[index]
        except ValueError:
            return f"image {index}"

    def read(self, index: int, draws_of: int | None = None) -> tuple[Any, int]:
        """Return an image, augmented with its own draws or another's, and its label. Raises Unusable."""
        draws_of = index if draws_of is None else draws_of
        return self.pixels(lambda: self.images.paths[index], draws_of, self.transform), self.images.label(index)

    def __getitem__(self, index: int) -> tuple | None:
        index = range(len(self))[index]
        tried: list[int] = []
        place = index
        for attempt in range(1, min(TRIES, len(self)) + 1):
            try:
                item = self.read(place, index)
                return item if self.unreadable == "replace" else (*item, index)
            except Unusable as error:
                self.skip(place, error)
            if self.unreadable == "omit":
                return None
            tried.append(place)
            place = item_seed(self.seed, self.epoch, index, attempt) % len(self)
            while place in tried and len(tried) < len(self):
                place = (place + 1) % len(self)
        raise ValueError(self.none_usable(indices=tried))


def collate_present(items: Sequence[tuple | None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Batch the items of an `unreadable="omit"` data set without its Nones; None where no item is left.

    Returns pixels (n, views, 3, H, W), or (n, …) where items have one view, labels and data set indices, int64 (n,).
    """
    present = [item for item in items if item is not None]
    if not present:
        return None
    stacked = [(torch.stack(pixels) if isinstance(pixels, list) else pixels, *rest) for pixels, *rest in present]
    return tuple(default_collate(stacked))


def present_batches(
    dataset: ImageItems, batches: Sequence[Sequence[int]], workers: int, pin_memory: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
    """Yield what collate_present makes of the items of each batch of indices.

    Raises ValueError where `dataset.in_a_row` of them are missing one after the other: a disk that went away.
    """
    missing: list[int] = []
    for indices, batch in zip(batches, load(dataset, batches, workers, collate_present, pin_memory), strict=True):
        present = set() if batch is None else set(batch[2].tolist())
        for index in indices:
            missing = [] if index in present else [*missing, index]
            if len(missing) >= dataset.in_a_row:
                raise ValueError(dataset.none_usable(indices=missing))
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
