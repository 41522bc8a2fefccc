"""Training items from extracted codes, whichever layout holds them.

    data = open_codes("imagenet_code_c2i_flip_ten_crop", image_size=256, seed=0)
    data.set_epoch(3)
    data[0]      # {"codes": int64 (256,), "label": int}, and what is stored beside the codes

The view of a sample is a function of (seed, epoch, index).
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.code_files import CodeSettings, PublishedFolder, ShardFolder, published_folders, published_sizes
from dataset.pixels import Reading
from dataset.store import INDEX_FILE
from utils.origin import require_same
from utils.rng import item_seed

if TYPE_CHECKING:
    from dataset.arrays import ArrayFolder

logger = logging.getLogger(__name__)

_ALIKE = ["tokenizer", "classes", "num_classes", "images", "views", "image_size", "codebook_size", "exif", "background"]

# The word of --dataset.
CODES = "imagenet_code"


def recorded_size(folder: str | Path) -> tuple[int | None, int | None]:
    """Return the pixels a side of the images and of a token, as far as a folder of codes says: packed, published, or of pairs."""
    folder = Path(folder)
    if not folder.is_dir():
        return None, None
    packed = next(
        (file for file in (folder / INDEX_FILE, *sorted(folder.glob(f"*/{INDEX_FILE}"))) if file.exists()), None
    )
    if packed is None:
        sizes = published_sizes(folder)
        return (sizes[0] if len(sizes) == 1 else None), None
    settings = CodeSettings.read(packed.parent)
    return settings.image_size, settings.image_size // math.isqrt(settings.tokens)


class CodeDataset(Dataset):
    """Items {"codes": int64 (tokens,), "label": int}, each of one view of one of `sources`, which hold the same samples.

    Where there are several sources, one is drawn per sample, and with `random_view` one of its views, both from
    (seed, epoch, index); without, it is the centre view. Raises ValueError where the sources hold other samples.
    """

    def __init__(self, sources: Sequence[ShardFolder | PublishedFolder], seed: int = 0, random_view: bool = True):
        first = sources[0]
        for source in sources[1:]:
            if source.tokens != first.tokens or not np.array_equal(source.numbers, first.numbers):
                held = [f"{one.folder} ({len(one)} samples of {one.tokens} tokens)" for one in (first, source)]
                both = f"{' and '.join(held)} are drawn from together but hold other images"
                raise ValueError(f"{both}: extract both from the same data set")
            if first.settings and source.settings:
                one, other = (vars(s) | Reading.recorded(s.extra).record() for s in (first.settings, source.settings))
                folders = str(first.folder), str(source.folder)
                require_same(one, other, _ALIKE, folders, "extract one of them again, or give the other another name")
        self.sources, self.seed, self.random_view = sources, seed, random_view
        self.settings: CodeSettings | None = first.settings
        self.tokens = first.tokens
        self.arrays: dict[str, ArrayFolder] = {}
        self._limits: dict[str, tuple[int, str]] = {}
        # Shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.sources[0])

    def add(self, arrays: "Mapping[str, ArrayFolder]") -> None:
        """Give every item an array of each of these folders too. Raises ValueError where they are of other images or views."""
        for one in arrays.values():
            for source in self.sources:
                views = source.view_names if self.random_view else [source.view_names[_center(source.view_names)]]
                one.require_codes(source, views)
            if len(self.sources) > 1 and one.views != ["any"]:
                drawn = " and ".join(str(source.folder) for source in self.sources)
                mine = f"{one.name} in {one.folder} is of one crop"
                raise ValueError(f"{mine}, and {drawn} are drawn from: rename one of them")
        self.arrays |= arrays
        self._numbers = self.sources[0].numbers

    def sizes(self) -> dict[str, int | None]:
        """Return num_classes and codebook_size as far as they are known."""
        if self.settings is None:
            return {}
        return {"num_classes": self.sources[0].num_classes, "codebook_size": self.settings.codebook_size}

    def limit(self, num_classes: int, vocab_size: int) -> None:
        """Refuse codes and labels that a model has no row for: a label too large by one would pass for "no class".

        Raises ValueError where the folder records more of either. Of a folder without a record the batch raises it.
        """
        path, settings = self.sources[0].folder, self.settings
        if settings and (settings.num_classes or 0) > num_classes:
            more = f"{path} has {settings.num_classes} classes, more than {num_classes}"
            flag = f"pass --num-classes {settings.num_classes}"
            raise ValueError(f"{more}; {flag}, and --finetune too where training begins with another model's weights")
        if settings and (size := settings.codebook_size) > vocab_size:
            raise ValueError(f"{path} was made with {size} codes; pass --vocab-size {size}")
        self._limits = {"label": (num_classes, "--num-classes"), "codes": (vocab_size, "--vocab-size")}

    def rows(self) -> dict[str, int]:
        """Return the arrays whose items have as many rows as each needs, and how many a batch gets: those of the longest."""
        return {name: one.rows for name, one in self.arrays.items() if one.rows is not None}

    def identity(self) -> list[dict[str, str]]:
        """Return an identity of each folder, which tells whether its content is still the same."""
        return [folder.identity() for folder in (*self.sources, *self.arrays.values())]

    def set_epoch(self, epoch: int) -> None:
        """Draw other views in the next pass; reaches running workers too."""
        self._epoch[0] = epoch

    def sample_numbers(self, indices: Sequence[int]) -> list[int]:
        """Return the numbers that extraction gave these samples: unreadable images count too."""
        return self.sources[0].numbers[list(indices)].tolist()

    def describe(self) -> str:
        """Return a line for the log: folders, samples and what is drawn."""
        folders = " and ".join(f"{source.folder} ({len(source.view_names)} views)" for source in self.sources)
        drawn = "a random view of each" if self.random_view else "the centre view of each"
        return f"codes: {folders}, {len(self)} samples of {self.tokens} tokens, {drawn}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items of a batch at once: DataLoader calls this instead of one index at a time."""
        positions = np.asarray(indices, dtype=np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"indices from {positions.min()} to {positions.max()} of {len(self)} samples")
        chosen, views = self._draw(positions)
        codes = np.empty((len(positions), self.tokens), np.int64)
        for number in np.unique(chosen):
            mine = np.flatnonzero(chosen == number)
            codes[mine] = self.sources[number].rows(positions[mine], views[mine])
        labels = self.sources[0].labels(positions)
        self._require_below("label", labels[:, None], positions)
        self._require_below("codes", codes, positions)
        items = [
            {"codes": row, "label": label} for row, label in zip(torch.from_numpy(codes).unbind(), labels.tolist())
        ]
        for name, arrays in self.arrays.items():
            for item, position, source, view in zip(items, positions, chosen, views, strict=True):
                item[name] = arrays.get(int(self._numbers[position]), self.sources[source].view_names[view])
        return items

    def _require_below(self, name: str, values: np.ndarray, positions: np.ndarray) -> None:
        limit, flag = self._limits.get(name, (None, ""))
        if limit is None or not values.size or 0 <= values.min() <= values.max() < limit:
            return
        row = np.flatnonzero(((values < 0) | (values >= limit)).any(1))[0]
        low, high = values[row].min(), values[row].max()
        found = f"{name} {low}" if low == high else f"{name} from {low} to {high}"
        raise ValueError(f"sample {positions[row]} of {self.sources[0].folder} has {found}, not below {flag} {limit}")

    def _draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return per sample the number of its source and of the view in it: (n,), (n,)."""
        epoch = int(self._epoch[0])
        draws = np.asarray([item_seed(self.seed, epoch, i) for i in positions.tolist()], np.int64)
        draws, sources = np.divmod(draws, len(self.sources))
        names = [source.view_names for source in self.sources]
        if self.random_view:
            return sources, draws % np.asarray([len(views) for views in names])[sources]
        return sources, np.asarray(list(map(_center, names)))[sources]


def _center(views: Sequence[str]) -> int:
    return views.index("center") if "center" in views else 0


def open_codes(
    code_path: str | Path,
    image_size: int | None = None,
    downsample_size: int = 16,
    seed: int = 0,
    random_view: bool | None = None,
) -> CodeDataset:
    """Open the codes of a folder, whichever layout it holds, for images of `image_size` pixels.

    Where there is a folder with 'ten_crop_105' in the place of 'ten_crop' beside it, samples are drawn from both.

    Args:
        image_size: pixels a side (default: the only size that the folder holds).
        downsample_size: pixels a side of a token.
        seed: decides what is drawn.
        random_view: False for the centre view of this folder alone. By default a view is drawn of packed codes; of the
            published layout only with 'flip' in the path, as its scripts do.

    Raises:
        FileNotFoundError: where the folder is missing.
        ValueError: where it holds neither layout, is incomplete, or its images have not (image_size / downsample_size)²
            tokens.
    """
    folder = Path(code_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"the code folder {folder} does not exist: check --code-path, or extract codes first")
    sizes = published_sizes(folder)
    packed = (folder / INDEX_FILE).exists()
    if packed:
        source = ShardFolder(folder)
        random_view = random_view is not False
        size = image_size or source.settings.image_size
    elif image_size in sizes or (image_size is None and len(sizes) == 1):
        source = PublishedFolder(folder, size := image_size or sizes[0])
    elif sizes:
        raise ValueError(f"{folder} holds codes of --image-size {', '.join(map(str, sizes))}, not {image_size}")
    else:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        published = f"{published_folders(folder, image_size or 256)[0].name}/ of the published layout"
        raise ValueError(
            f"{folder} holds no codes: neither {INDEX_FILE} of packed shards nor {published}. In it: {there}"
        )
    if image_size and source.tokens != (expected := (size // downsample_size) ** 2):
        side = math.isqrt(source.tokens)
        fits = f", which fits --image-size {side * downsample_size}" if side**2 == source.tokens else ""
        needed = f"--image-size {size} with --downsample-size {downsample_size} needs {expected}"
        raise ValueError(f"codes in {folder} have {source.tokens} tokens per image{fits}; {needed}")
    if packed and source.settings.image_size != size:
        raise ValueError(f"{folder} holds codes of --image-size {source.settings.image_size}, not {size}")
    if not len(source):
        raise ValueError(f"{folder} has no codes: all {source.items} images were skipped")
    sources = [source]
    holding = [INDEX_FILE] if packed else [place.name for place in published_folders(folder, size)]
    if random_view is not False and (sibling := ten_crop_sibling(folder, holding)):
        sources.append(ShardFolder(sibling) if packed else PublishedFolder(sibling, size))
        crop = sources[1].settings.crop_range if sources[1].settings else None
        if crop not in (None, 1.05):
            other = f"{sibling} is of --crop-range {crop}, and its name says 1.05"
            raise ValueError(f"{other}: rename it, or extract it again with --crop-range 1.05")
    if random_view is None:
        random_view = "flip" in str(code_path)
        if not random_view and (views := len(source.view_names)) > 1:
            told = "%s has %d views of each image, but only the centre one is used: 'flip' is not in its path"
            logger.warning(told, code_path, views)
    data = CodeDataset(sources, seed, random_view)
    logger.info(data.describe())
    return data


def ten_crop_sibling(folder: Path, holding: Sequence[str]) -> Path | None:
    """Return the folder with 'ten_crop_105' where this one has 'ten_crop', in one part of its path or in all, if it holds these."""
    parts = folder.parts
    renamed = [re.sub("ten_crop(?!_105)", "ten_crop_105", part) for part in parts]
    changed = [place for place, part in enumerate(parts) if renamed[place] != part]
    one_each = [(*parts[:place], renamed[place], *parts[place + 1 :]) for place in reversed(changed)]
    there = [Path(*candidate) for candidate in [*one_each, renamed] if changed and Path(*candidate).is_dir()]
    return there[0] if there and all((there[0] / name).exists() for name in holding) else None
