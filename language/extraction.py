"""Extraction of text features: captions read and cleaned in loader processes, encoded by length, written where they are missing."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from logging import Logger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.extraction import Batch, extract_missing
from dataset.lines import CaptionLines, compare_before_writing, record_lines
from dataset.pairs import TextSource, caption_of
from dataset.store import INDEX_FILE, Loose, read_record, refuse_other, shard_items
from dataset.text_features import FeatureWriter
from language.t5 import T5Embedder, encoder_identity, fingerprint, preprocess
from utils.distributed import Distributed
from utils.errors import AgreedError
from utils.files import write_json
from utils.loading import load, loader_workers

MAX_LENGTH = 120
LINES_AT_ONCE = 256  # that a loader process reads and cleans before it hands them over
# A shard of so many lines without a single caption is no accident, but another kind of file or the wrong key.
NONE_OF = 100

RECORD = "extraction.json"  # of published features, which have no index
DTYPES = {"none": "float32", "fp16": "float16", "bf16": "bfloat16"}


class PackedTarget(FeatureWriter):
    """Folder of packed features that captions go to."""

    def __init__(self, args: argparse.Namespace, embedder: T5Embedder):
        settings = {
            "t5": args.t5_model_type,
            "fingerprint": fingerprint(embedder),
            "precision": args.precision,
            "caption_key": args.caption_key,
            "truncated": args.trunc_caption,
            "cleaning": "twice",
        }
        super().__init__(
            args.t5_path,
            dim=embedder.dim,
            max_length=MAX_LENGTH,
            dtype=args.feature_dtype or DTYPES[args.precision],
            settings=settings,
            shard_size=args.shard_size,
        )

    def wanted(self, stem: str, lines: Iterable[int]) -> list[int]:
        """Return which of these lines of a shard are to be written."""
        return [*lines]

    def write(self, stem: str, shard: int, lines: int, features: dict[int, Tensor]) -> None:
        """Write a shard of a file of so many lines."""
        here = shard_items(shard, lines, self.shard_size)
        self.write_shard(stem, shard, [features.get(line) for line in here], lines)

    def captions(self, files: Sequence[tuple[str, int]], found: int) -> int:
        """Return how many captions of the files have features: some may be an earlier run's."""
        return sum(lines - self.skipped(stem, lines) for stem, lines in files)


class PublishedTarget:
    """Folder of the published layout. Raises ValueError where it has packed features: with both, which are meant is a guess."""

    def __init__(self, args: argparse.Namespace, embedder: T5Embedder):
        self.folder, self.shard_size = Path(args.t5_path), args.shard_size
        if (self.folder / INDEX_FILE).exists():
            held = f"{self.folder} holds packed features"
            raise ValueError(f"{held}: give --t5-path another folder for the published layout")
        record, made = self.folder / RECORD, {"precision": args.precision}
        if record.exists():
            refuse_other(self.folder, "features", read_record(record), made)
        elif not any(self.folder.glob("*/*.npy")):  # a first edition's, which are accepted
            write_json(record, made)

    def _files(self, stem: str) -> Loose:
        return Loose(self.folder / stem, "floats", ())

    def missing_shards(self, stem: str, lines: int) -> list[int]:
        """Return the shards of a file in which a line has no features yet."""
        there = set(self._files(stem).numbers.tolist())
        count = -(-lines // self.shard_size)
        return [k for k in range(count) if not there.issuperset(shard_items(k, lines, self.shard_size))]

    def wanted(self, stem: str, lines: Iterable[int]) -> list[int]:
        """Return those of the lines that have no features yet."""
        return [line for line in lines if not (self.folder / stem / f"{line}.npy").exists()]

    def write(self, stem: str, shard: int, lines: int, features: dict[int, Tensor]) -> None:
        """Write the lines: float32 (1, length, D) each."""
        for line, rows in features.items():
            self._files(stem).write(line, rows.float().numpy())

    def captions(self, files: Sequence[tuple[str, int]], found: int) -> int:
        """Return how many captions were found, or 1 where an earlier run has written some: others are not counted."""
        return found or int(any(len(self._files(stem).numbers) for stem, _ in files))


class Captions:
    """The token numbers of captions, read, cleaned and cut; a string that says why where there is no caption.

    key: which of a line's texts. truncate: only the text before the first full stop.
    """

    def __init__(self, pairs: TextSource, tokenizer: Any, key: str, truncate: bool):
        self.pairs, self.tokenizer, self.key, self.truncate = pairs, tokenizer, key, truncate

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> list[int] | str:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[list[int] | str]:
        """Return the items of several lines at once: DataLoader calls this instead of one index at a time."""
        items: dict[int, list[int] | str] = {}
        texts = {}
        for index in indices:
            try:
                text = caption_of(self.pairs, index, self.key, self.truncate)
            except ValueError as error:
                items[index] = str(error)
                continue
            if cleaned := preprocess(text):
                texts[index] = cleaned
            else:
                left = f", {text[:60]!r}, once it is cleaned" if text.strip() else ""
                items[index] = f"{self.pairs.where(index)} has an empty caption{left}"
        if texts:
            tokens = self.tokenizer(list(texts.values()), max_length=MAX_LENGTH, truncation=True)["input_ids"]
            items |= zip(texts, tokens, strict=True)
        return [items[index] for index in indices]


def extract(
    args: argparse.Namespace,
    pairs: TextSource,
    chosen: Sequence[int],
    embedder: T5Embedder,
    dist: Distributed,
    log: Logger,
) -> None:
    """Encode and write the missing captions of the `chosen` files, each process its share. Every process calls it.

    Raises ValueError where captions of other lines or another encoder are there, or a file has no captions, and on all
    processes where there are none at all.
    """
    kind = CaptionLines.kind_of(args.caption_key, args.trunc_caption)
    lines = CaptionLines(pairs, kind, encoder_identity(embedder))
    target = (PublishedTarget if args.published_layout else PackedTarget)(args, embedder)
    captions = Captions(pairs, embedder.tokenizer, args.caption_key, args.trunc_caption)
    skipped = 0

    def missing() -> list[Batch]:
        shards = [(k, shard) for k in chosen for shard in target.missing_shards(*pairs.files[k])]
        compare_before_writing(Path(args.t5_path), lines, chosen)
        batches = []
        for k, shard in shards:
            here = shard_items(shard, pairs.files[k][1], args.shard_size)
            here = range(lines.starts[k] + here.start, lines.starts[k] + here.stop)
            batches += [
                ((k, shard), here[first : first + LINES_AT_ONCE]) for first in range(0, len(here), LINES_AT_ONCE)
            ]
        return batches

    def read(batches: list[range]) -> Iterator[list[list[int] | str]]:
        return load(captions, batches, loader_workers(args.num_workers, dist), list)

    def write(unit: tuple[int, int], batches: list[list[list[int] | str]]) -> int:
        nonlocal skipped
        (k, shard), items = unit, [item for batch in batches for item in batch]
        stem, count = pairs.files[k]
        here = shard_items(shard, count, args.shard_size)
        reasons = [item for item in items if isinstance(item, str)]
        if len(reasons) == len(items) >= NONE_OF:
            raise ValueError(f"none of {len(items)} lines in a row has a caption; the first: {reasons[0]}")
        for reason in reasons:
            log.warning(f"skipped: {reason}")
        skipped += len(reasons)
        ids = {line: item for line, item in zip(here, items, strict=True) if not isinstance(item, str)}
        wanted = target.wanted(stem, ids)
        # All of the shard where any is missing: what is encoded together, and so rounded, does not depend on it.
        features = dict(zip(ids, encode_captions(embedder, [*ids.values()], args.batch_size))) if wanted else {}
        record_lines(Path(args.t5_path, stem), lines, k, here, made=wanted)
        target.write(stem, shard, count, {line: features[line] for line in wanted})
        return len(features)

    extract_missing(dist, log, "captions", missing, read, lambda batch: batch, write)
    files = [pairs.files[k] for k in chosen]
    count, skipped = sum(lines for _, lines in files), sum(dist.gather(skipped))
    there = dist.broadcast(target.captions(files, count - skipped) if dist.is_main else None)
    if not there:
        raise AgreedError(
            f"none of the {count} lines has a caption: check --data-path and --caption-key, and give another --t5-path, or "
            f"remove {args.t5_path}; the first: {captions[lines.starts[chosen[0]]]}"
        )
    if dist.is_main:
        log.info(f"{args.t5_path}: features of {there} captions, {count - there} lines without a caption skipped")


def encode_captions(embedder: T5Embedder, ids: Sequence[list[int]], batch_size: int) -> list[Tensor]:
    """Return the features (length, dim) of captions given as token numbers, on the CPU.

    Captions of like length are encoded together, `batch_size` at a time and padded to the longest of them: an alternative
    text has 15 tokens where the published extraction computes 120. A function of `ids` and `batch_size`.
    """
    features: dict[int, Tensor] = {}
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
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
        features |= {place: rows[row, : len(ids[place])] for row, place in enumerate(batch)}
    return [features[place] for place in range(len(ids))]
