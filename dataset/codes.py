"""Training items from extracted codes, whichever layout holds them.

    data = open_codes("imagenet_code_c2i_flip_ten_crop", image_size=256, seed=0)
    data.set_epoch(3)
    codes, label = data[0]      # int64 (256,), int

Packed shards (dataset/shards.py) are recognised by their `index.json`, the published one-file-per-image layout
(dataset/published.py) by its `imagenet{size}_codes` folder. The view of a sample is a function of (seed, epoch, index).
"""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.pixels import Reading
from dataset.published import PublishedFolder, published_folders, published_sizes, record_published, write_published
from dataset.shards import INDEX_FILE, CodeSettings, CodeWriter, ShardFolder
from utils.origin import require_same
from utils.rng import item_seed

__all__ = [
    "CodeDataset",
    "CodeSettings",
    "CodeWriter",
    "PackedCodes",
    "PublishedCodes",
    "open_codes",
    "record_published",
    "write_published",
]

logger = logging.getLogger(__name__)


class CodeDataset(Dataset):
    """Items (codes int64 (tokens,), label int), each of one view of one of `sources`, which hold the same samples.

    Where there are several sources, one is drawn per sample, and with `random_view` one of its views, both from
    (seed, epoch, index); without, it is the centre view. Raises ValueError where the sources hold other samples.
    """

    def __init__(self, sources: Sequence[ShardFolder | PublishedFolder], seed: int, random_view: bool):
        first = sources[0]
        for source in sources[1:]:
            if source.tokens != first.tokens or not np.array_equal(source.numbers, first.numbers):
                raise ValueError(
                    f"{first.folder} ({len(first)} samples of {first.tokens} tokens) and {source.folder} "
                    f"({len(source)} of {source.tokens}) are drawn from together but hold other images: "
                    "extract both from the same data set"
                )
            if first.settings and source.settings:
                require_same(
                    *(vars(s) | Reading.recorded(s.extra).record() for s in (first.settings, source.settings)),
                    (
                        "tokenizer",
                        "classes",
                        "num_classes",
                        "images",
                        "views",
                        "image_size",
                        "codebook_size",
                        "exif",
                        "background",
                    ),
                    (str(first.folder), str(source.folder)),
                    "extract one of them again, or give the other folder another name",
                )
        self.sources = sources
        self.seed = seed
        self.random_view = random_view
        # Shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.sources[0])

    @property
    def settings(self) -> CodeSettings | None:
        """Return the folder's record; None of published files that record nothing."""
        return self.sources[0].settings

    def sizes(self) -> dict[str, int | None]:
        """Return num_classes and codebook_size as far as they are known."""
        if self.settings is None:
            return {}
        return {
            "num_classes": self.sources[0].num_classes,
            "codebook_size": self.settings.codebook_size,
        }

    def identity(self) -> list[dict[str, str]]:
        """Return an identity of each source, which tells whether its codes are still the same."""
        return [source.identity() for source in self.sources]

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return self.sources[0].tokens

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass draw other views; reaches running workers too."""
        self._epoch[0] = epoch

    def describe(self) -> str:
        """One line for the log: folders, samples and what is drawn."""
        folders = " and ".join(f"{source.folder} ({len(source.view_names)} views)" for source in self.sources)
        drawn = "a random view of each" if self.random_view else "the centre view of each"
        return f"codes: {folders}, {len(self)} samples of {self.tokens} tokens, {drawn}"

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """The items of a batch at once: DataLoader calls this instead of one index at a time."""
        positions = np.asarray(indices, dtype=np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"indices from {positions.min()} to {positions.max()} of {len(self)} samples")
        chosen, views = self._draw(positions)
        codes = np.empty((len(positions), self.tokens), np.int64)
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(chosen == number)
            if len(mine):
                codes[mine] = source.rows(positions[mine], views[mine])
        return list(zip(torch.from_numpy(codes).unbind(), self.sources[0].labels(positions).tolist()))

    def _draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per sample, the number of its source and the view in it: (n,), (n,)."""
        epoch = int(self._epoch[0])
        draws = np.asarray([item_seed(self.seed, epoch, i) for i in positions.tolist()], np.int64)
        draws, sources = np.divmod(draws, len(self.sources))
        names = [source.view_names for source in self.sources]
        if self.random_view:
            return sources, draws % np.asarray([len(views) for views in names])[sources]
        return sources, np.asarray([views.index("center") if "center" in views else 0 for views in names])[sources]


class PackedCodes(CodeDataset):
    """The codes of a folder of packed shards, and of its ten_crop_105 sibling where there is one and views are drawn.

    Raises FileNotFoundError and ValueError as ShardFolder does.
    """

    def __init__(self, folder: str | Path, seed: int = 0, random_view: bool = True):
        sources = [ShardFolder(folder)]
        if random_view and (sibling := ten_crop_sibling(folder)) and (sibling / INDEX_FILE).exists():
            sources.append(checked_sibling(ShardFolder(sibling)))
        super().__init__(sources, seed, random_view)

    def verify(self) -> None:
        """Reads every file and compares its checksum. Raises ValueError that names the damaged ones."""
        for source in self.sources:
            source.verify()


class PublishedCodes(CodeDataset):
    """The codes of a folder in the published layout, whose name decides what is drawn.

    With 'flip' in the path a random view is drawn; a folder named with 'ten_crop' beside one with 'ten_crop_105' in its
    place gives one of both with probability 1/2. `random_view` overrides the name: False is the centre view of this
    folder alone. Raises FileNotFoundError and ValueError as PublishedFolder does.
    """

    def __init__(self, code_path: str | Path, image_size: int, seed: int = 0, random_view: bool | None = None):
        sources = [PublishedFolder(code_path, image_size)]
        sibling = ten_crop_sibling(code_path) if random_view is not False else None
        if sibling and all(folder.is_dir() for folder in published_folders(sibling, image_size)):
            sources.append(checked_sibling(PublishedFolder(sibling, image_size)))
        if random_view is None:
            random_view = "flip" in str(code_path)
            if not random_view and len(sources[0].view_names) > 1:
                logger.warning(
                    "%s has %d views of each image, but only the centre one is used: 'flip' is not in its path",
                    code_path,
                    len(sources[0].view_names),
                )
        super().__init__(sources, seed, random_view)


def open_codes(
    code_path: str | Path,
    image_size: int,
    downsample_size: int = 16,
    seed: int = 0,
    random_view: bool | None = None,
) -> PackedCodes | PublishedCodes:
    """Opens the codes of a folder, whichever layout it holds, for images of `image_size` pixels.

    Raises FileNotFoundError where the folder is missing, ValueError where it holds neither layout, is incomplete, or
    its images have not (image_size / downsample_size)² tokens.
    """
    folder = Path(code_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"the code folder {folder} does not exist: check --code-path, or extract codes first")
    if (folder / INDEX_FILE).exists():
        data = PackedCodes(folder, seed, True if random_view is None else random_view)
    elif image_size in (sizes := published_sizes(folder)):
        data = PublishedCodes(folder, image_size, seed, random_view)
    elif sizes:
        raise ValueError(f"{folder} holds codes of --image-size {', '.join(map(str, sizes))}, not {image_size}")
    else:
        entries = sorted(entry.name for entry in folder.iterdir())
        raise ValueError(
            f"{folder} holds no codes: neither {INDEX_FILE} of packed shards nor "
            f"{published_folders(folder, image_size)[0].name}/ of the published layout. "
            f"In it: {', '.join(entries[:8]) + (', ...' if len(entries) > 8 else '') or 'nothing'}"
        )
    expected = (image_size // downsample_size) ** 2
    if data.tokens != expected:
        side = math.isqrt(data.tokens)
        fits = f", which fits --image-size {side * downsample_size}" if side**2 == data.tokens else ""
        raise ValueError(
            f"codes in {folder} have {data.tokens} tokens per image{fits}; --image-size {image_size} with "
            f"--downsample-size {downsample_size} needs {expected}"
        )
    if isinstance(data, PackedCodes) and data.settings.image_size != image_size:
        raise ValueError(f"{folder} holds codes of --image-size {data.settings.image_size}, not {image_size}")
    logger.info(data.describe())
    return data


def ten_crop_sibling(folder: str | Path) -> Path | None:
    """The existing folder with 'ten_crop_105' where this one has 'ten_crop': in one part of its path, or in all."""
    parts = Path(folder).parts
    renamed = [re.sub("ten_crop(?!_105)", "ten_crop_105", part) for part in parts]
    changed = [place for place, part in enumerate(parts) if renamed[place] != part]
    one_each = [(*parts[:place], renamed[place], *parts[place + 1 :]) for place in reversed(changed)]
    for candidate in [*one_each, renamed] if changed else []:
        if Path(*candidate).is_dir():
            return Path(*candidate)
    return None


def checked_sibling(source: ShardFolder | PublishedFolder) -> ShardFolder | PublishedFolder:
    """Return the ten_crop_105 folder. Raises ValueError where it records another crop than its name tells."""
    crop = source.settings.crop_range if source.settings else None
    if crop not in (None, 1.05):
        raise ValueError(
            f"{source.folder} is of --crop-range {crop}, and its name has it drawn from as that of 1.05: rename it, or "
            "extract it again with --crop-range 1.05"
        )
    return source
