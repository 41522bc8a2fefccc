"""Extraction of codes: what is missing of some folders is encoded, by any number of processes.

Images are encoded in batches that end with their shard: which are encoded together, and so how sums are rounded, does not
depend on which shards a process has to write.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from logging import Logger
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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
from dataset.extraction import Batch, extract_missing
from dataset.images import ImageItems, present_batches
from dataset.pixels import Reading
from dataset.store import Loose, read_record, refuse_other
from tokenizer.base import Tokenizer
from utils.distributed import Distributed
from utils.files import write_json
from utils.loading import loader_workers
from utils.training.parallel import HALF

# Pixels that go through the encoder at once: 32 views of 256x256, some 6 GB of float32 activations at VQ-16's widths.
ENCODED_PIXELS = 32 * 256 * 256
PAIRS_RECORD = "extraction.json"  # of published codes of pairs, which have no index


class PackedTarget:
    """Folder of packed shards that the codes of some items of a data set go to.

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

    def write(self, shard: int, codes: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> None:
        """Write a shard: codes (n, views, N), labels (n,), numbers of the items (n,)."""
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

    def write(self, shard: int, codes: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> None:
        """Write a file for each image."""
        for code, label, number in zip(codes, labels, numbers, strict=True):
            write_published(self.folder, self.settings.image_size, number, code, label)


class PublishedPairs(PackedTarget):
    """Folder of the published layout of one file of image-text pairs."""

    def missing(self, batch_size: int) -> list[tuple[int, range]]:
        """Return the batches in which a pair has no codes yet. Raises ValueError where other codes are there."""
        files = Loose(self.folder, "integers", (self.settings.tokens,), "write to another folder")
        if len(files.numbers):
            files.get(files.numbers[0])
        before, now = recorded_extra(self.folder), self.settings.extra
        if before is None:
            write_json(self.folder / PAIRS_RECORD, now)
        else:  # codes without a record were read as published, in a precision that is not known
            refuse_other(self.folder, "codes", (before or now) | Reading.recorded(before).record(), now)
        return _lacking(self.settings, batch_size, files.numbers)

    def write(self, shard: int, codes: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> None:
        """Write a file for each pair."""
        for code, number in zip(codes[:, 0].astype(np.int64), numbers, strict=True):
            Loose(self.folder, "integers", ()).write(number, code)


def recorded_extra(folder: str | Path) -> dict | None:
    """Return the extra settings of the codes of one file of pairs, {} where codes alone are there; None where nothing is."""
    folder = Path(folder)
    if settings := recorded_settings(folder, 0):
        return settings.extra
    if (folder / PAIRS_RECORD).exists():
        return read_record(folder / PAIRS_RECORD)
    return {} if any(folder.glob("[0-9]*.npy")) else None


def code_settings(tokenizer: Tokenizer, args: argparse.Namespace, reading: Reading, **more: object) -> CodeSettings:
    """Return what a folder records of codes that this tokenizer makes with these flags."""
    precision = {} if args.mixed_precision == "none" else {"mixed_precision": args.mixed_precision}
    return CodeSettings(
        image_size=args.image_size,
        tokens=(args.image_size // tokenizer.downsample) ** 2,
        codebook_size=tokenizer.codebook_size,
        vq_model=tokenizer.family,
        tokenizer=tokenizer.fingerprint(),
        shard_size=args.shard_size,
        extra=precision | reading.record(),
        **more,
    )


def shard_batches(settings: CodeSettings, shards: Iterable[int], batch_size: int) -> list[tuple[int, range]]:
    """Return (shard, items) of every batch, in order."""
    return [
        (shard, images[first : first + batch_size])
        for shard in shards
        for images in (settings.images_of(shard),)
        for first in range(0, len(images), batch_size)
    ]


def _lacking(settings: CodeSettings, batch_size: int, there: Iterable[int]) -> list[tuple[int, range]]:
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

    def missing() -> list[Batch]:
        return [
            ((k, shard), range(items.start + target.start, items.stop + target.start))
            for k, target in enumerate(targets)
            for shard, items in target.missing(args.batch_size)
        ]

    def read(batches: list[range]) -> Iterable:
        workers = loader_workers(args.num_workers, dist)
        return present_batches(dataset, batches, workers, tokenizer.device.type == "cuda")

    def encode(batch: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        if batch is None:  # none of its images could be read
            return None
        pixels, labels, numbers = batch  # (n, views, 3, H, W), (n,), (n,)
        codes = encode_views(tokenizer, pixels.to(tokenizer.device, non_blocking=True), args.mixed_precision)
        return codes.to("cpu", torch.int32), labels, numbers

    def write(unit: tuple[int, int], encoded: list[tuple[Tensor, ...] | None]) -> int:
        (k, shard), settings = unit, targets[unit[0]].settings
        none = torch.zeros(0, len(settings.views), settings.tokens), torch.zeros(0).long(), torch.zeros(0).long()
        parts = zip(*([part for part in encoded if part] or [none]), strict=True)
        codes, labels, numbers = (torch.cat(part).numpy() for part in parts)
        numbers = numbers - targets[k].start
        if targets[k].record:
            targets[k].record(settings.images_of(shard), numbers.tolist())
        targets[k].write(shard, codes, labels, numbers)
        return len(numbers)

    extract_missing(dist, log, "images", missing, read, encode, write)


def memory_format(device: torch.device) -> torch.memory_format:
    """Return how an encoder's images lie in memory: channels-last on a CPU. On CUDA each group norm would undo that."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def encode_views(
    tokenizer: Tokenizer, pixels: Tensor, mixed_precision: str = "none", pixels_at_once: int = ENCODED_PIXELS
) -> Tensor:
    """Return the codes of every view of every image: (n, views, 3, H, W) in [-1, 1] -> int64 (n, views, N), raster order.

    mixed_precision: autocast of the encoder (none, fp16 or bf16); the search in the codebook is float32 always.
    pixels_at_once: as many views go through at a time as have so many pixels.
    Raises ValueError where latents are not finite.
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
