"""Extraction of codes: what is missing of some folders is encoded, by any number of processes.

    extract(tokenizer, dataset, [PackedTarget("codes", settings)], dist, log, args)

Images are encoded in batches that end with their shard: which are encoded together, and so how sums are rounded, does not
depend on which shards a process has to write.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from logging import Logger
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.code_files import (
    SHARD_SIZE,
    CodeSettings,
    CodeWriter,
    published_folders,
    published_record,
    record_settings,
    recorded_settings,
    write_published,
)
from dataset.extraction import counted, dealt
from dataset.images import ImageItems, present_batches
from dataset.pixels import Reading
from dataset.store import Loose
from tokenizer.base import Tokenizer
from utils.distributed import Distributed
from utils.files import write_json
from utils.loading import loader_workers
from utils.training.parallel import HALF

# Pixels that go through the encoder at once: 32 views of 256x256, some 6 GB of float32 activations at VQ-16's widths.
ENCODED_PIXELS = 32 * 256 * 256
PAIRS_RECORD = "extraction.json"  # of published codes of pairs, which have no index

Batch = tuple[tuple[int, int], range]
"""A target's number and its shard; the numbers of items in the data set."""


class PackedTarget:
    """Folder of packed shards that the codes of some items of a data set go to.

    Args:
        folder: where the shards lie.
        settings: of the codes.
        start: number of its first item in the data set.
        record: called with a shard's items and those that have codes, before these are written.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: CodeSettings,
        start: int = 0,
        record: Callable[[range, list[int]], None] | None = None,
    ):
        self.folder, self.settings, self.start, self.record = Path(folder), settings, start, record

    def missing(self, batch_size: int) -> list[tuple[int, range]]:
        """Return (shard, items) of every batch of the shards that are not there whole."""
        return shard_batches(self.settings, CodeWriter(self.folder, self.settings).missing_shards(), batch_size)

    def write(self, shard: int, codes: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """Write a shard: codes (n, views, N), labels (n,), numbers of the items (n,)."""
        if self.record:
            self.record(self.settings.images_of(shard), numbers.tolist())
        shape = (len(numbers), len(self.settings.views), self.settings.tokens)
        self._write(shard, codes.numpy().reshape(shape), labels.numpy(), numbers.numpy())

    def _write(self, shard: int, codes: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> None:
        skipped = np.setdiff1d(self.settings.images_of(shard), numbers).tolist()
        CodeWriter(self.folder, self.settings).write_shard(shard, codes, labels, numbers, skipped)


class PublishedTarget(PackedTarget):
    """Folder of the published layout of class-conditional codes."""

    def missing(self, batch_size: int) -> list[tuple[int, range]]:
        """Return the batches in which an image has no codes yet; all, where the folder does not record whose its codes are."""
        record = published_record(self.settings.image_size)
        begun = (self.folder / record).exists()
        record_settings(self.folder, replace(self.settings, shard_size=SHARD_SIZE), record)
        labels = published_folders(self.folder, self.settings.image_size)[1]  # a sample is whole once it has one
        return _lacking(self.settings, batch_size, Loose(labels, "integers", ()).numbers if begun else ())

    def _write(self, shard: int, codes: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> None:
        for code, label, number in zip(codes, labels.tolist(), numbers.tolist(), strict=True):
            write_published(self.folder, self.settings.image_size, number, code, label)


class PublishedPairs(PackedTarget):
    """Folder of the published layout of one file of image-text pairs."""

    def missing(self, batch_size: int) -> list[tuple[int, range]]:
        """Return the batches in which a pair has no codes yet. Raises ValueError where other codes are there."""
        loose = Loose(self.folder, "integers", ())
        there = loose.numbers
        if len(there):
            file = self.folder / f"{there[0]}.npy"
            shape = np.load(file, mmap_mode="r").shape
            if shape != (1, self.settings.tokens):
                raise ValueError(
                    f"{file} has shape {shape}, these codes (1, {self.settings.tokens}): write to another folder"
                )
        before = recorded_extra(self.folder)
        if before is None:
            write_json(self.folder / PAIRS_RECORD, self.settings.extra)
        elif Reading.recorded(before) != Reading.recorded(self.settings.extra):
            raise ValueError(
                f"the codes in {self.folder} were made with"
                f"{Reading.recorded(before).flags() or ' --exif --background white'}: give the same flags, or another "
                "--code-path"
            )
        return _lacking(self.settings, batch_size, there)

    def _write(self, shard: int, codes: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> None:
        for code, number in zip(codes[:, 0].astype(np.int64), numbers.tolist(), strict=True):
            Loose(self.folder, "integers", ()).write(number, code)


def recorded_extra(folder: str | Path) -> dict | None:
    """Return the extra settings of the codes of one file of pairs, {} where codes alone are there; None where nothing is."""
    folder = Path(folder)
    if settings := recorded_settings(folder, 0):
        return settings.extra
    if (folder / PAIRS_RECORD).exists():
        return json.loads((folder / PAIRS_RECORD).read_bytes())
    return {} if any(folder.glob("[0-9]*.npy")) else None


def extra_settings(mixed_precision: str, reading: Reading) -> dict:
    """Return what codes record of the encoder's precision and of how files were read."""
    return ({} if mixed_precision == "none" else {"mixed_precision": mixed_precision}) | reading.record()


def shard_batches(settings: CodeSettings, shards: Sequence[int], batch_size: int) -> list[tuple[int, range]]:
    """Return (shard, items) of every batch, in order."""
    return [
        (shard, images[first : first + batch_size])
        for shard, images in ((shard, settings.images_of(shard)) for shard in shards)
        for first in range(0, len(images), batch_size)
    ]


def _lacking(settings: CodeSettings, batch_size: int, there: Sequence[int]) -> list[tuple[int, range]]:
    there = set(there)
    batches = shard_batches(settings, range(settings.num_shards), batch_size)
    return [(shard, items) for shard, items in batches if not there.issuperset(items)]


def extract(
    tokenizer: Tokenizer,
    dataset: ImageItems,
    targets: Sequence[PackedTarget],
    dist: Distributed,
    log: Logger,
    args: argparse.Namespace,
) -> None:
    """Encode and write what is missing of the targets, each process its share. Every process calls it."""
    batches: list[Batch] | None = None
    if dist.is_main:  # it looks for all: one that looked for itself would miss what a quicker one has written already
        batches = [
            ((k, shard), range(items.start + target.start, items.stop + target.start))
            for k, target in enumerate(targets)
            for shard, items in target.missing(args.batch_size)
        ]
    batches = dist.broadcast(batches)
    mine = set(dealt(dict.fromkeys(unit for unit, _ in batches), dist))
    batches = [batch for batch in batches if batch[0] in mine]
    with counted(dist, log, "images", sum(len(items) for _, items in batches)) as progress:
        workers = loader_workers(args.num_workers, dist)
        for (k, shard), codes, labels, numbers in encoded(
            tokenizer, dataset, batches, workers, args.mixed_precision, progress
        ):
            targets[k].write(shard, codes, labels, numbers - targets[k].start)


def encoded(
    tokenizer: Tokenizer,
    dataset: ImageItems,
    batches: Sequence[Batch],
    workers: int,
    mixed_precision: str,
    progress: tqdm,
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor, Tensor]]:
    """Yield (unit, codes int32 (n, views, N), labels (n,), item numbers (n,)) of every unit in `batches`.

    One loader goes through all of them, so that its `workers` processes start once; one unit is held at a time.
    """
    present = present_batches(dataset, [items for _, items in batches], workers, tokenizer.device.type == "cuda")
    for unit, loaded in groupby(zip(batches, present, strict=True), key=lambda pair: pair[0][0]):
        found = []
        for (_, items), batch in loaded:
            if batch is not None:  # it is None where none of its images could be read
                pixels, labels, numbers = batch  # (n, views, 3, H, W), (n,), (n,)
                codes = encode_views(tokenizer, pixels.to(tokenizer.device, non_blocking=True), mixed_precision)
                found.append((codes.to("cpu", torch.int32), labels, numbers))
            progress.update(len(items))
        if found:
            yield unit, *(torch.cat(parts) for parts in zip(*found, strict=True))
        else:
            yield unit, *(torch.zeros(0, dtype=torch.int64) for _ in range(3))


def memory_format(device: torch.device) -> torch.memory_format:
    """Return how an encoder's images lie in memory: channels-last on a CPU. On CUDA each group norm would undo that."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def encode_views(
    tokenizer: Tokenizer, pixels: Tensor, mixed_precision: str = "none", pixels_at_once: int = ENCODED_PIXELS
) -> Tensor:
    """Return the codes of every view of every image: (n, views, 3, H, W) in [-1, 1] -> int64 (n, views, N), raster order.

    Args:
        tokenizer: on the device of the pixels.
        pixels: the views.
        mixed_precision: autocast of the encoder (none, fp16 or bf16); the search in the codebook is float32 always.
        pixels_at_once: as many views go through at a time as have so many pixels.

    Raises:
        ValueError: where latents are not finite.
    """
    flat = pixels.flatten(0, 1)  # (n*views, 3, H, W)
    views = max(1, pixels_at_once // flat[0, 0].numel())
    dtype = HALF.get(mixed_precision)
    with torch.inference_mode(), torch.autocast(pixels.device.type, dtype, enabled=dtype is not None):
        layout = memory_format(flat.device)
        codes = torch.cat([tokenizer.to_codes(part.contiguous(memory_format=layout)) for part in flat.split(views)])
    if (codes < 0).any():
        raise ValueError(
            "the tokenizer's latents are not finite, so they have no nearest code: are the weights of --vq-ckpt whole? "
            "With --mixed-precision fp16 they may be too large for it; try bf16 or none"
        )
    return codes.view(*pixels.shape[:2], -1)


def require_whole_tokens(tokenizer: Tokenizer, image_size: int) -> None:
    """Raise ValueError where the tokenizer does not divide the image."""
    if image_size % tokenizer.downsample:
        raise ValueError(
            f"--image-size {image_size} is not a multiple of {tokenizer.downsample}, the pixels a side of a token"
        )
