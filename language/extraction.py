"""Extraction of text features: captions read and cleaned in loader processes, encoded by length, written where they are missing."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.pairs import caption_of
from dataset.store import INDEX_FILE
from dataset.text_features import FeatureWriter, num_shards, published_lines, shard_lines, write_published_features
from language.t5 import T5Embedder, fingerprint, preprocess
from utils.loading import load

MAX_LENGTH = 120
LINES_AT_ONCE = 256  # that a loader process reads and cleans before it hands them over
# A shard of so many lines without a single caption is no accident, but another kind of file or the wrong key.
NONE_OF = 100

DTYPES = {"none": "float32", "fp16": "float16", "bf16": "bfloat16"}

Unit = tuple[int, int]
"""A file's number among all, and a shard's among the file's."""


class PackedTarget:
    """Folder of packed features that captions go to."""

    def __init__(self, args: argparse.Namespace, embedder: T5Embedder):
        self.folder = args.t5_path
        settings = {
            "t5": args.t5_model_type,
            "fingerprint": fingerprint(embedder),
            "precision": args.precision,
            "caption_key": args.caption_key,
            "truncated": args.trunc_caption,
            "cleaning": "twice",
        }
        self.index = {
            "dim": embedder.dim,
            "max_length": MAX_LENGTH,
            "dtype": args.feature_dtype or DTYPES[args.precision],
            "settings": settings,
            "shard_size": args.shard_size,
        }

    def missing(self, stem: str, lines: int) -> list[int]:
        """Return the shards of a file that are not there whole."""
        return FeatureWriter(self.folder, **self.index).missing_shards(stem, lines)

    def wanted(self, stem: str, lines: dict[int, list[int]]) -> list[int]:
        """Return which of these lines of a shard are to be written."""
        return [*lines]

    def write(self, stem: str, shard: int, lines: int, here: range, features: dict[int, Tensor]) -> None:
        """Write a shard, the lines `here` of a file of so many."""
        FeatureWriter(self.folder, **self.index).write_shard(stem, shard, [features.get(line) for line in here], lines)

    def count(self, files: Sequence[tuple[str, int]], found: int) -> int:
        """Return how many captions of the files have features: some may be an earlier run's."""
        writer = FeatureWriter(self.folder, **self.index)
        return sum(lines - writer.skipped(stem, lines) for stem, lines in files)


class PublishedTarget(PackedTarget):
    """Folder of the published layout. Raises ValueError where it has packed features: with both, which are meant is a guess."""

    def __init__(self, args: argparse.Namespace, embedder: T5Embedder):
        self.folder, self.shard_size = args.t5_path, args.shard_size
        if Path(self.folder, INDEX_FILE).exists():
            raise ValueError(
                f"{self.folder} holds packed features: give --t5-path another folder for the published layout"
            )

    def missing(self, stem: str, lines: int) -> list[int]:
        """Return the shards of a file in which a line has no features yet."""
        there = published_lines(self.folder, stem, range(lines))
        shards = [shard_lines(shard, lines, self.shard_size) for shard in range(num_shards(lines, self.shard_size))]
        return [shard for shard, here in enumerate(shards) if not there[here.start : here.stop].all()]

    def wanted(self, stem: str, lines: dict[int, list[int]]) -> list[int]:
        """Return those of the lines that have no features yet."""
        return [line for line in lines if not Path(self.folder, stem, f"{line}.npy").exists()]

    def write(self, stem: str, shard: int, lines: int, here: range, features: dict[int, Tensor]) -> None:
        """Write the lines."""
        for line, rows in features.items():
            write_published_features(self.folder, stem, line, rows)

    def count(self, files: Sequence[tuple[str, int]], found: int) -> int:
        """Return how many captions were found, or 1 where an earlier run has written some: others are not counted."""
        return found or int(any(published_lines(self.folder, stem, range(lines)).any() for stem, lines in files))


class Captions:
    """The token numbers of captions, read, cleaned and cut; a string that says why where there is no caption.

    key: which of a line's texts. truncate: only the text before the first full stop.
    """

    def __init__(self, pairs: Any, tokenizer: Any, key: str, truncate: bool):
        self.pairs, self.tokenizer = pairs, tokenizer
        self.key, self.truncate = key, truncate
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> list[int] | str:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[list[int] | str]:
        """Return the items of several lines at once: DataLoader calls this instead of one index at a time."""
        items: list[list[int] | str] = [""] * len(indices)
        texts = {}
        for place, index in enumerate(indices):
            try:
                text = caption_of(self.pairs, index, self.key, self.truncate)
                texts[place] = preprocess(text)
            except ValueError as error:
                items[place] = str(error)
                continue
            if not texts[place]:
                del texts[place]
                left = f", {text[:60]!r}, once it is cleaned" if text.strip() else ""
                items[place] = f"{self.pairs.where(index)} has an empty caption{left}"
        if texts:
            tokens = self.tokenizer(list(texts.values()), max_length=MAX_LENGTH, truncation=True)["input_ids"]
            for place, ids in zip(texts, tokens, strict=True):
                items[place] = ids
        return items


def read_shards(
    captions: Captions, units: Sequence[Unit], shard_size: int, workers: int
) -> Iterator[tuple[Unit, list[list[int] | str]]]:
    """Yield (file and shard, an item of `captions` for each of its lines) of every shard in `units`.

    One loader goes through all the shards, so that its `workers` processes start once and work ahead of the encoder.
    """
    starts = [0, *accumulate(count for _, count in captions.pairs.files)]
    batches = []
    for k, shard in units:
        lines = shard_lines(shard, captions.pairs.files[k][1], shard_size)
        for first in range(lines.start, lines.stop, LINES_AT_ONCE):
            last = min(first + LINES_AT_ONCE, lines.stop)
            batches.append(((k, shard), range(starts[k] + first, starts[k] + last)))
    loaded_lines = load(captions, [indices for _, indices in batches], workers, list)
    for unit, loaded in groupby(zip(batches, loaded_lines, strict=True), key=lambda pair: pair[0][0]):
        items = [item for _, batch in loaded for item in batch]
        reasons = [item for item in items if isinstance(item, str)]
        if len(reasons) == len(items) >= NONE_OF:
            raise ValueError(f"none of {len(items)} lines in a row has a caption; the first: {reasons[0]}")
        captions.skipped += len(reasons)
        yield unit, items


def encode_captions(embedder: T5Embedder, ids: Sequence[list[int] | None], batch_size: int) -> list[Tensor | None]:
    """Return the features (length, dim) of captions given as token numbers, on the CPU; None for a None.

    Captions of like length are encoded together, `batch_size` at a time and padded to the longest of them: an alternative
    text has 15 tokens where the published extraction computes 120. A function of `ids` and `batch_size`.
    """
    features: list[Tensor | None] = [None] * len(ids)
    order = sorted((place for place in range(len(ids)) if ids[place] is not None), key=lambda place: len(ids[place]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        longest = -(-len(ids[batch[-1]]) // 8) * 8  # matrix units like whole eights
        padded = torch.full((len(batch), longest), embedder.tokenizer.pad_token_id)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, place in enumerate(batch):
            length = len(ids[place])
            padded[row, :length] = torch.tensor(ids[place])
            mask[row, :length] = 1
        rows = embedder.encode(padded, mask).cpu()  # (batch, longest, dim)
        for row, place in enumerate(batch):
            features[place] = rows[row, : len(ids[place])]
    return features
