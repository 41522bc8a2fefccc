"""Sources of image-text pairs, a folder of *.jsonl lists or of WebDataset *.tar shards; their images as extraction encodes them.

pairs = open_pairs("laion_coco"); pairs.identity(7), pairs.texts(7)
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset.augmentation import center_view
from dataset.images import ImageItems, Unusable
from dataset.jsonl import JsonPairs
from dataset.pixels import DEFAULT, Reading
from dataset.webdataset import TarPairs

Pairs = JsonPairs | TarPairs
# A few in a row are an accident or small pictures; so many are a wrong path or a disk that went away.
UNUSABLE_IN_A_ROW = 256


def open_pairs(folder: str | Path, index_path: str | Path | None = None) -> Pairs:
    """Open the pairs of a folder of *.jsonl lists or of *.tar shards; index_path: see TarPairs.

    Raises FileNotFoundError where the folder is missing, ValueError where it holds neither or both, and as the two do.
    """
    folder = Path(folder)
    lists, shards = (any(folder.glob(pattern)) for pattern in ("*.jsonl", "*.tar*"))
    if lists and shards:
        raise ValueError(f"{folder} holds *.jsonl and *.tar: give each a folder of its own")
    return TarPairs(folder, index_path) if shards else JsonPairs(folder)


def chosen_files(pairs: Any, first: int, last: int | None) -> list[int]:
    """Return the numbers of the files from --data-start to --data-end, both included; None: to the last there is."""
    count = len(pairs.files)
    chosen = [k for k in range(count) if first <= k <= (count if last is None else last)]
    if not chosen:
        numbered = f"the {count} files, which are numbered 0 to {count - 1}"
        raise ValueError(f"--data-start {first} --data-end {last} selects none of {numbered}")
    return chosen


class PairItems(ImageItems):
    """Base of the two data sets of pairs."""

    kind, skipping = "pairs", "does not count:"

    def __init__(self, pairs: Pairs, image_size: int | None, seed: int = 0, reading: Reading = DEFAULT):
        super().__init__(len(pairs), seed, reading, in_a_row=min(UNUSABLE_IN_A_ROW, len(pairs)))
        self.pairs, self.image_size, self.where = pairs, image_size, pairs.where


class PairViews(PairItems):
    """Data set of what extraction encodes: items ([centre crop (3, H, W)], 0, index) for `present_batches`, None for unusable pairs."""

    def read(self, index: int) -> Tensor:
        """Return the centre crop of a pair's image. Raises Unusable."""
        crop = partial(center_view, image_size=self.image_size)
        return self.pixels(lambda: self.pairs.image_file(index), index, crop, self.image_size)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, int] | None:
        try:
            return [self.read(index)], 0, index
        except Unusable as error:
            self.skip(index, error)
            return None
