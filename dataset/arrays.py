"""Arrays stored beside codes, one an image: what else a model is conditioned on, such as a depth map.

    write_arrays("depth", "depth", maps, of="codes")                 # maps: an array for each sample of the codes
    ArrayFolder("depth", "depth").get(17)                            # of the image numbered 17

`--condition-path depth=depth` of the training scripts brings them into the batch under their name. For image-text pairs
there is a folder for each file, `depth/{stem}/`, as there is one of codes.
"""

import hashlib
import logging
import shutil
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from dataset.code_files import PublishedFolder, ShardFolder
from dataset.codes import CodeDataset, open_codes
from dataset.store import ENDS, INDEX_FILE, Fixed, Ragged, Shards, Stems, read_record, shard_items
from utils.files import write_json

logger = logging.getLogger(__name__)

ANY_VIEW = ("any",)
_RESERVED = ("codes", "label", "image", "caption", "valid")


def write_arrays(
    folder: str | Path,
    name: str,
    arrays: Sequence,
    *,
    of: str | Path | None = None,
    views: Sequence[str] = ("center",),
    shard_size: int = 4096,
) -> None:
    """Store an array for each image. What the folder held before is replaced.

    Args:
        name: of the condition, by which batches have them.
        arrays: (n, …), or a sequence of n arrays of one dtype, of one shape or each with its own number of rows.
        of: folder of codes whose samples they are of, in order. Without it array i is that of image i.
        views: that the first axis goes through where there are several; ANY_VIEW where they hold for whichever is drawn.

    Raises ValueError for arrays that do not go together, or not with the samples or the folder.
    """
    folder, codes = Path(folder), open_codes(of).sources[0] if of else None
    settings = codes.settings if codes is not None else None
    if (folder / INDEX_FILE).exists() and "array" not in read_record(folder / INDEX_FILE):
        raise ValueError(f"{folder} holds codes or features: give {name} a folder of its own")
    numbers = np.arange(len(arrays)) if codes is None else codes.numbers
    if len(numbers) != len(arrays) or not len(arrays):
        raise ValueError(f"{len(arrays)} arrays of {name} for {len(numbers)} samples: give one for each")
    first = np.asarray(arrays[0])
    shapes = {np.shape(array) for array in arrays}
    ragged = len(shapes) > 1
    if ragged and {shape[1:] for shape in shapes} != {first.shape[1:]}:
        raise ValueError(f"arrays of {name} have shapes {sorted(shapes)[:4]}: only the first axis may differ")
    if len(views) > 1 and (ragged or first.shape[:1] != (len(views),)):
        raise ValueError(f"arrays of {name} are {first.shape}: the first axis has to go through {', '.join(views)}")
    items = settings.num_images if settings else int(numbers[-1]) + 1
    index = {
        "array": name,
        "dtype": first.dtype.name,
        "shape": [None, *first.shape[1:]] if ragged else list(first.shape),
        "rows": max(shape[0] for shape in shapes) if ragged else None,
        "items": items,
        "shard_size": shard_size,
        "views": list(views),
        "images": settings.images if settings else None,
        "crop_range": settings.crop_range if settings else None,
    }
    for record in folder.glob("shard-*.json"):
        record.unlink()
    write_json(folder / INDEX_FILE, index)
    for lines in Path(of).glob("lines-*.npz") if of else ():  # which lines of a list the codes are of
        shutil.copy(lines, folder)
    shards = Shards(folder)
    for shard in range(-(-items // shard_size)):
        wanted = shard_items(shard, items, shard_size)
        place, end = np.searchsorted(numbers, [wanted.start, wanted.stop])
        there = dict(zip(numbers[place:end].tolist(), map(np.asarray, arrays[place:end]), strict=True))
        parts = [np.empty((0, *first.shape[ragged:]), first.dtype)]
        if ragged:
            ends = np.cumsum([len(there.get(number, ())) for number in wanted]).astype(np.uint32)
            shards.write(shard, {"": [*parts, *there.values()], ENDS: [ends]}, lines=items, captions=len(there))
        else:
            skipped = [number for number in wanted if number not in there]
            parts += [array[None] for array in there.values()]
            shards.write(shard, {"": parts}, samples=len(there), skipped=skipped)


class ArrayFolder:
    """Reader of what write_arrays wrote. Raises ValueError where a folder is incomplete or holds something else."""

    def __init__(self, folder: str | Path, name: str):
        self.folder, self.name = Path(folder), name
        index = read_record(self.folder / INDEX_FILE)
        if index.get("array") != name:
            held = index.get("array", "codes or features")
            raise ValueError(f"{folder} holds {held}, not {name}: check --condition-path")
        self.items, self.views, self.rows = index["items"], index["views"], index["rows"]
        self.images, self.crop_range = index["images"], index["crop_range"]
        shape, again = tuple(index["shape"]), "write it again with dataset.arrays.write_arrays"
        shards, size = Shards(folder, again), index["shard_size"]
        self._arrays: Fixed | Ragged = (
            Fixed(shards, index["dtype"], shape, self.items, size, again)
            if self.rows is None
            else Ragged(shards, index["dtype"], shape[1:], size, again)
        )
        several = len(self.views) > 1
        self._nothing = np.zeros((0, *shape[1:]) if self.rows is not None else shape[several:], index["dtype"])

    def get(self, number: int, view: str = "center") -> Tensor | None:
        """Return an image's array, that of a view where there are several; None where it has none."""
        array = self._arrays.get(number)
        if array is not None and len(self.views) > 1:
            array = array[self.views.index(view)]
        return None if array is None else torch.as_tensor(array)

    def nothing(self) -> Tensor:
        """Return zeros in the shape of an array, for a pair that does not count; no rows where each has its own number."""
        return torch.as_tensor(self._nothing)

    def identity(self) -> dict[str, str]:
        """Return a digest that tells whether the arrays are still the same."""
        shards = self._arrays.shards
        return _identity(self.name, [sorted(shards.record(k)["files"].items()) for k in range(self._arrays.count)])

    def require_codes(self, codes: ShardFolder | PublishedFolder, views: Sequence[str]) -> None:
        """Raise ValueError where the arrays are of other images, crops or `views` than are drawn, or not of all images."""
        mine, theirs = f"{self.name} in {self.folder}", codes.folder
        images, crop = (codes.settings.images, codes.settings.crop_range) if codes.settings else (None, None)
        any_view = self.views == list(ANY_VIEW)
        missing = [] if any_view else [view for view in views if view not in self.views]
        absent = np.setdiff1d(codes.numbers, np.flatnonzero(self._arrays.present()))
        if None in (images, self.images):
            logger.info("%s or %s does not record its images: they could not be compared", self.folder, theirs)
        elif images != self.images:
            raise ValueError(f"{mine} and {theirs} are of other images: write it again for these codes")
        elif crop != self.crop_range and not any_view:
            both = f"{mine} is of --crop-range {self.crop_range}, {theirs} of {crop}"
            raise ValueError(f"{both}: write it again for these codes")
        if missing:
            both = f"{mine} has the views {', '.join(self.views)}, and {theirs} {', '.join(missing)} too"
            raise ValueError(f"{both}: write an array for each view (views=…), or extract the codes with --no-flip")
        if len(absent):
            lacking = f"{self.folder} has no {self.name} of image {absent[0]} (and {len(absent) - 1} more) of {theirs}"
            raise ValueError(f"{lacking}: write it for all of them")


class PairArrays(Stems):
    """Arrays of image-text pairs by (file stem, line): an ArrayFolder for each stem that has a folder.

    Raises FileNotFoundError where none of the stems has one.
    """

    def __init__(self, folder: str | Path, name: str, stems: Iterable[str]):
        there = [stem for stem in stems if (Path(folder) / stem).is_dir()]
        super().__init__(folder, {stem: ArrayFolder(Path(folder) / stem, name) for stem in there})
        if not there:
            raise FileNotFoundError(f"{folder} has no {name} of these pairs: a folder for each file is looked for")
        self.name = name
        self.rows = max((one.rows for one in self.stems.values() if one.rows is not None), default=None)

    def nothing(self) -> Tensor:
        return next(iter(self.stems.values())).nothing()

    def identity(self) -> dict[str, str]:
        return _identity(self.name, {stem: one.identity() for stem, one in sorted(self.stems.items())})


def _identity(name: str, content: Any) -> dict[str, str]:
    return {name: hashlib.sha256(repr(content).encode()).hexdigest()[:16]}


def condition_folders(words: Sequence[str] | None) -> dict[str, str]:
    """Return {name: folder} of the flag --condition-path NAME=FOLDER. Raises ValueError for a name that is taken."""
    folders = {}
    for word in words or ():
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or name in folders or name in _RESERVED:
            taken = ", ".join([*_RESERVED, *folders])
            raise ValueError(f"--condition-path {word}: give NAME=FOLDER with a name other than {taken}")
        folders[name] = folder
    return folders


def codes_of(args: Namespace, **kwargs: Any) -> CodeDataset:
    """Open the codes of `args.code_path`, with those of `args.condition_path` beside them. kwargs: of `open_codes`."""
    size, downsample = getattr(args, "image_size", 256), getattr(args, "downsample_size", 16)
    codes = open_codes(args.code_path, size, downsample, **{"seed": getattr(args, "global_seed", 0), **kwargs})
    further = condition_folders(getattr(args, "condition_path", None))
    codes.add({name: ArrayFolder(folder, name) for name, folder in further.items()})
    return codes


def collate(items: Sequence[Mapping[str, Any]], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Batch items by name: every entry stacked, those of `rows` by `left_padded`.

    rows: entries whose items have as many rows as each needs, and how many a batch has: (B, rows, dim), and `{name}_length`
    int64 (B,). There is no mask: the device makes it from the lengths (`prefix_mask`).
    """
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if name in rows:
            batch[name], batch[f"{name}_length"] = left_padded(values, rows[name])
        else:
            batch[name] = default_collate(values)
    return batch


def left_padded(features: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Batch captions of different lengths, in the order the Transformer reads them.

    features: (length_i, D) each, a length of 0 for no caption. Longer ones are cut to their first `tokens` rows.
    Returns (B, tokens, D), features last and padding rows zero, and the lengths, int64 (B,), both on the features' device.
    """
    # That of the first with rows: one without has some dtype at hand.
    dtype = next((caption.dtype for caption in features if len(caption)), features[0].dtype)
    padded = features[0].new_zeros(len(features), tokens, features[0].shape[1], dtype=dtype)
    lengths = [min(len(caption), tokens) for caption in features]
    for row, caption, length in zip(padded, features, lengths, strict=True):
        row[tokens - length :] = caption[:length]
    return padded, torch.tensor(lengths, dtype=torch.int64, device=padded.device)


def prefix_mask(lengths: Tensor, tokens: int) -> Tensor:
    """Tell which of the `tokens` rows hold a caption: lengths (B,) -> bool (B, tokens), on the lengths' device."""
    return torch.arange(tokens, device=lengths.device) >= tokens - lengths[:, None]
