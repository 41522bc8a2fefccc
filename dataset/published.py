"""The published layout of codes, one small file per image, to read and to write.

    write_published("codes_flip", 256, 17, codes, label)    # codes (views, tokens)
    codes = PublishedFolder("codes_flip", 256).rows(positions, views)

Codes: `{folder}/imagenet{size}_codes/{i}.npy` int64 (1, views, tokens); labels: `imagenet{size}_labels/{i}.npy` (1,).
`imagenet{size}.json`, which folders of the published scripts and of the first edition lack, has the settings.
"""

import os
import re
from pathlib import Path
from reprlib import repr as short

import numpy as np

from dataset.augmentation import VIEWS
from dataset.shards import INDEX_FILE, CodeSettings, refuse_other_settings, samples_identity
from utils.files import atomic_write, write_json

_NAME = re.compile(r"(0|[1-9][0-9]*)\.npy")
_SIZED = re.compile(r"imagenet([0-9]+)_codes")


def published_folders(folder: str | Path, image_size: int) -> tuple[Path, Path]:
    """The folders of the codes and of the labels of one image size."""
    return Path(folder) / f"imagenet{image_size}_codes", Path(folder) / f"imagenet{image_size}_labels"


def published_sizes(folder: str | Path) -> list[int]:
    """The image sizes of which a folder holds codes in the published layout."""
    if not Path(folder).is_dir():
        return []
    return sorted(int(found[1]) for name in os.listdir(folder) if (found := _SIZED.fullmatch(name)))


def published_record(image_size: int) -> str:
    """The name of the file with the settings of the codes of one image size."""
    return f"imagenet{image_size}.json"


def recorded_settings(folder: str | Path, image_size: int) -> CodeSettings | None:
    """Return the record of a folder's codes in either layout; None where it is not there or records nothing."""
    for name in (INDEX_FILE, published_record(image_size)):
        if (Path(folder) / name).exists():
            return CodeSettings.read(folder, name)
    return None


def record_published(folder: str | Path, settings: CodeSettings) -> None:
    """Writes the settings, before codes. Raises ValueError where the folder records others."""
    file = Path(folder) / published_record(settings.image_size)
    if file.exists():
        refuse_other_settings(Path(folder), settings, file.name)
    else:
        write_json(file, settings.to_json())


def write_published(folder: str | Path, image_size: int, i: int, codes: np.ndarray, label: int) -> None:
    """Writes the sample numbered `i`: codes (views, tokens), tensors too. A sample is whole once its label is there.

    Raises ValueError for codes of another shape.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2:
        raise ValueError(f"codes of sample {i} must be (views, tokens), got {codes.shape}")
    for place, array in zip(published_folders(folder, image_size), (codes[None], np.asarray([int(label)]))):
        with atomic_write(place / f"{i}.npy") as f:
            np.save(f, array.astype(np.int64))


class PublishedFolder:
    """Reads codes of the published layout; position p is the p-th number among the files.

    Raises FileNotFoundError where a folder is missing, ValueError where codes and labels are not of the same samples or
    a file is not as the layout has it.
    """

    def __init__(self, folder: str | Path, image_size: int):
        self.folder = Path(folder)
        self.image_size = image_size
        self._codes, self._labels = published_folders(folder, image_size)
        self.numbers = published_numbers(self._codes)  # (n,), ascending: the data set indices
        numbered_labels = published_numbers(self._labels)
        for have, lack, there, here in (
            (self.numbers, numbered_labels, self._codes, self._labels),
            (numbered_labels, self.numbers, self._labels, self._codes),
        ):
            only = np.setdiff1d(have, lack)
            if len(only):
                raise ValueError(
                    f"{len(have)} samples in {there}, {len(lack)} in {here}: {len(only)} are missing in {here} "
                    f"({short([f'{i}.npy' for i in only.tolist()])}). Extract them again, or remove the others"
                )
        if not len(self.numbers):
            raise ValueError(f"no codes ({{i}}.npy) in {self._codes}")
        self._shape = _load(self._codes / f"{self.numbers[0]}.npy", 3).shape
        recorded = self.folder / published_record(image_size)
        self.settings = CodeSettings.read(self.folder, recorded.name) if recorded.exists() else None
        beyond = self.numbers[-1] if self.settings and self.numbers[-1] >= self.settings.num_images else None
        if beyond is not None:
            raise ValueError(
                f"{self._codes} has {beyond}.npy, and {recorded} tells of {self.settings.num_images} images: remove "
                "what is left of another extraction"
            )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def tokens(self) -> int:
        return self._shape[2]

    @property
    def view_names(self) -> list[str]:
        """Recorded names, or by their number, as extraction orders them: the files carry none."""
        names = self.settings.views if self.settings else VIEWS.get(self._shape[1])
        return list(names or [f"view_{k}" for k in range(self._shape[1])])

    @property
    def num_classes(self) -> int | None:
        """As recorded: reading a label of every file would take long."""
        return self.settings.num_classes if self.settings else None

    def identity(self) -> dict[str, str]:
        """Digests that tell whether codes are still the same; those that both sides have are compared."""
        return samples_identity(self)

    def all_views(self, position: int) -> np.ndarray:
        """The codes of one sample, (views, tokens) int64."""
        file = self._codes / f"{self.numbers[position]}.npy"
        array = _load(file, 3)
        if array.shape != self._shape:
            raise ValueError(f"{file} has shape {array.shape}, the first file of its folder {self._shape}")
        return array[0]

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """Labels (n,) int64 of the samples at these positions, 0 to len - 1."""
        files = [self._labels / f"{self.numbers[p]}.npy" for p in positions]
        return np.asarray([_load(file, 1)[0] for file in files], dtype=np.int64)

    def rows(self, positions: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The codes (n, tokens) int64 of one view of each sample."""
        return np.stack([self.all_views(p)[view] for p, view in zip(positions, views)])


def published_numbers(folder: Path) -> np.ndarray:
    """The numbers of the samples in a folder of {i}.npy files, ascending. Raises FileNotFoundError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: the published layout has codes and labels beside each other")
    numbers = [int(found[1]) for name in os.listdir(folder) if (found := _NAME.fullmatch(name))]
    return np.sort(np.asarray(numbers, dtype=np.int64))


def _load(file: Path, ndim: int) -> np.ndarray:
    try:
        array = np.load(file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): extract it again") from error
    if array.ndim != ndim or array.shape[0] != 1 or array.dtype.kind not in "iu":
        expected = "(1, views, tokens)" if ndim == 3 else "(1,)"
        raise ValueError(f"{file} holds {array.dtype} {array.shape}, expected integers {expected}")
    return array
