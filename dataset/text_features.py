"""Text features on disk: of each caption as many rows as it has tokens, packed in shards and read through memory maps.

    writer = FeatureWriter("t5_features", dim=2048, max_length=120, dtype="bfloat16", settings={"model": "flan-t5-xl"})
    for k in writer.missing_shards("part-00000", lines=50_000):
        writer.write_shard("part-00000", k, features, lines=50_000)      # a tensor (length, D) or None for every line
    store = Features("t5_features", dim=2048)
    features = store.get("part-00000", 17)                               # (length, D), None where there is none

A caption is known by its jsonl file's stem and its line there, from 0. Packed (dataset/store.py): a folder of shards for each
stem, `{stem}/shard-{k:06d}.npy` (sum of lengths, D) and `.ends.npy` uint32 (lines,), where each line's rows end; `index.json`
above them holds the settings, `lines-*.npz` what captions they are of (dataset/lines.py). `Features` reads the published
layout too, `{stem}/{line}.npy` float32 (1, length, D).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.lines import recorded_maker
from dataset.store import ENDS, INDEX_FILE, Loose, Ragged, Shards, Stems, read_record, refuse_other, shard_items
from utils.files import write_json

FORMAT = 1
SHARD_SIZE = 2048  # lines; with 120 rows of 2048 bfloat16 numbers each, 1 GB
EXTRACTION = "language/extract_t5_feature.py"
AGAIN = f"run {EXTRACTION} again, which rewrites the shard"
_KEYS = ("dim", "max_length", "dtype", "shard_size", "settings")

# Numpy has no bfloat16: its bits are kept as whole numbers.
_STORED = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


class FeatureWriter:
    """Writer of a folder's features; any number of processes may write, each its own shards.

    Args:
        folder: where they go. The first opening writes `index.json` there.
        dim, max_length: width of a row, rows a caption may have.
        dtype: bfloat16, float16 or float32, as which rows are stored.
        settings: what else decides the features (model, cleaning, which caption), plain JSON values.
        shard_size: lines a shard.

    Raises ValueError where the folder holds features of other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dim: int,
        max_length: int,
        dtype: str = "bfloat16",
        settings: dict | None = None,
        shard_size: int = SHARD_SIZE,
    ):
        self.folder, self.dtype, self.shard_size = Path(folder), dtype, shard_size
        self.dim, self.max_length = dim, max_length
        index = dict(zip(_KEYS, (dim, max_length, dtype, shard_size, settings or {}), strict=True))
        if (self.folder / INDEX_FILE).exists():
            there, now = dict(zip(_KEYS, _read_index(self.folder), strict=True)), dict(index)
            refuse_other(self.folder, "features", {**there, **there.pop("settings")}, {**now, **now.pop("settings")})
        else:
            write_json(self.folder / INDEX_FILE, {"format": FORMAT, **index})

    def missing_shards(self, stem: str, lines: int) -> list[int]:
        """Return the shards of a stem that are not there whole.

        Raises ValueError where the stem's features are of a file with another number of lines.
        """
        shards, count = Shards(self.folder / stem, AGAIN), -(-lines // self.shard_size)
        missing = shards.missing(count)
        for there in {shards.record(shard)["lines"] for shard in set(range(count)).difference(missing)} - {lines}:
            other = f"{self.folder / stem} has features of a file {stem} of {there} lines; now it has {lines}"
            raise ValueError(f"{other}: extract to another folder, or remove this one")
        return missing

    def skipped(self, stem: str, lines: int) -> int:
        """Return how many lines of a finished stem have no features."""
        shards = Shards(self.folder / stem)
        return lines - sum(shards.record(k)["captions"] for k in range(-(-lines // self.shard_size)))

    def write_shard(self, stem: str, shard: int, features: Sequence[Tensor | None], lines: int) -> None:
        """Write one shard of a stem.

        features: for every line of the shard, in order, a tensor (length, D) of any float dtype, or None where the line
        has no caption. lines: how many the file has.
        Raises ValueError where a value is not finite as it is stored.
        """
        parts = [np.empty((0, self.dim), _STORED[self.dtype])]
        for line, rows in zip(shard_items(shard, lines, self.shard_size), features, strict=True):
            if rows is None:
                continue
            assert rows.shape[1:] == (self.dim,) and 0 < len(rows) <= self.max_length, (stem, line, rows.shape)
            stored = rows.detach().to("cpu", getattr(torch, self.dtype)).contiguous()
            if not stored.isfinite().all():
                what = f"the features of line {line} of {stem} are not finite as {self.dtype}"
                raise ValueError(f"{what}: are the weights whole? T5 in float16 may overflow; bfloat16 does not")
            parts.append((stored.view(torch.uint16) if self.dtype == "bfloat16" else stored).numpy())
        ends = np.cumsum([0 if rows is None else len(rows) for rows in features]).astype(np.uint32)
        Shards(self.folder / stem).write(shard, {"": parts, ENDS: [ends]}, lines=lines, captions=len(parts) - 1)


class Features(Stems):
    """Features of captions by (stem, line), packed or in the published layout.

    `dim` is the width of a row, `encoder` the fingerprint of the model that made them, where it is recorded. Features stay on
    disk; of packed ones 4 bytes a line are in memory, of published ones nothing. dim: the width they must have.
    Raises FileNotFoundError, and ValueError where the folder has no features, a stem lacks shards, or a file is damaged.
    """

    def __init__(self, folder: str | Path, dim: int | None = None):
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"the folder of text features {folder} does not exist; {EXTRACTION} makes one")
        there = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self.packed, stems = (folder / INDEX_FILE).exists(), {}
        if self.packed:
            self.dim, self.max_length, self._dtype, size, self.settings = _read_index(folder)
            again = f"run the command that began it ({EXTRACTION}), which keeps what is there"
            for stem in there:
                if any((folder / stem).glob("*shard-*")):  # others are not of ours
                    shards = Shards(folder / stem, AGAIN)
                    stems[stem] = Ragged(shards, _STORED[self._dtype], (self.dim,), size, again)
        else:
            remedy = "remove it and extract it anew"
            stems = {stem: Loose(folder / stem, "floats", (None, "D"), remedy) for stem in there}
            first = next((one.get(number) for one in stems.values() for number, _ in one.files()), None)
            if first is None:
                layouts = f"neither {INDEX_FILE} of packed ones nor STEM/LINE.npy of the published layout"
                raise ValueError(f"{folder} holds no text features: {layouts}; {EXTRACTION} makes them")
            self.dim, self._dtype, self.settings = first.shape[1], "float32", {}
            for one in stems.values():
                one.shape = (None, self.dim)
        super().__init__(folder, stems)
        self.encoder = recorded_maker(folder, stems)
        if self.packed and not len(self):
            raise ValueError(f"{folder} has no features yet: run {EXTRACTION} to its end")
        if dim not in (None, self.dim):
            held = f"{folder} holds text features of width {self.dim}, but {dim} are needed"
            raise ValueError(f"{held}: features of another T5 than the model is trained for")

    def get(self, stem: str, line: int) -> Tensor | None:
        """Return the caller's own features (length, D) of a line (from 0) of a file; None where there are none."""
        found = super().get(stem, line)
        if found is None or self.packed:
            return None if found is None else torch.from_numpy(found).view(getattr(torch, self._dtype))
        return torch.from_numpy(found.astype(np.float32, copy=False))

    def present(self, stem: str) -> np.ndarray:
        """Return which lines of a stem have features, bool (lines,), in the published layout up to the last that has some."""
        return self.stems[stem].present() if stem in self.stems else np.zeros(0, bool)

    def __len__(self) -> int:
        return sum(int(self.present(stem).sum()) for stem in self.stems)


def _read_index(folder: Path) -> tuple:
    """Return the values of _KEYS that a folder records."""
    index = read_record(folder / INDEX_FILE, "extract the features to another folder")
    if index.get("format") != FORMAT or index.keys() != {"format", *_KEYS}:
        other = f"{folder / INDEX_FILE} is no index of text features, or of a format this version does not read"
        raise ValueError(f"{other}: extract to another folder")
    return tuple(index[key] for key in _KEYS)
