"""Encodes a folder of images into codes for train_c2i.py: packed shards, or with --published-layout one file an image.

    torchrun --nproc_per_node=8 autoregressive/train/extract_codes_c2i.py --data-path imagenet/train --code-path codes \\
        --vq-ckpt vq_ds16_c2i.pt --image-size 256 --ten-crop

The same command again goes on with the shards that are missing, on any number of processes.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    add_encoder_precision_flag,
    add_extraction_flags,
    add_image_size_flags,
    add_reading_flags,
    add_switch,
    add_tokenizer_flags,
    flag_parser,
    positive_float,
    positive_int,
    run_script,
    tokenizer_beliefs,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from tqdm import tqdm

    from dataset.codes import CodeSettings
    from dataset.images import ImageDataset
    from dataset.pixels import Reading
    from tokenizer.base import Tokenizer

# Pixels that go through the encoder at once: 32 views of 256x256, some 6 GB of float32 activations at VQ-16's widths.
ENCODED_PIXELS = 32 * 256 * 256


def main(args: argparse.Namespace) -> None:
    import time
    from dataclasses import replace
    from functools import partial

    from tqdm import tqdm

    from dataset.augmentation import code_views
    from dataset.build import build_dataset
    from dataset.codes import CodeWriter, record_published, write_published
    from dataset.pixels import Reading
    from dataset.published import recorded_settings
    from dataset.shards import SHARD_SIZE, ShardFolder
    from tokenizer.load import load_tokenizer
    from utils.distributed import start
    from utils.loading import loader_workers
    from utils.logger import console_logger
    from utils.origin import listed_classes
    from utils.runs import find_checkpoint

    if args.ten_crop and args.crop_range < 1:
        raise ValueError(f"--crop-range must be at least 1, got {args.crop_range}")
    dist = start(args.device)
    log = console_logger("dataset", dist.is_main)
    with dist.main_first():
        vq_path = find_checkpoint(args.vq_ckpt)
    tokenizer = load_tokenizer(
        vq_path,
        **tokenizer_beliefs(args),
        device=dist.device,
        use_ema=args.use_ema,
    ).to(memory_format=memory_format(dist.device))
    if args.image_size % tokenizer.downsample:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of {tokenizer.downsample}, the pixels a side of a token"
        )
    views = partial(
        code_views, image_size=args.image_size, ten_crop=args.ten_crop, crop_range=args.crop_range, flip=args.flip
    )
    begun = recorded_settings(args.code_path, args.image_size)
    dataset = build_dataset(
        args,
        transform=views,
        unreadable="omit",
        classes=classes_by_label(args),
        order=args.class_order,
        reading=Reading.of(args, begun.extra if begun else None),
    )
    if dataset.classes:
        log.info(f"classes: {listed_classes(dataset.classes)}")
    settings = code_settings(args, dataset, tokenizer)
    encode = partial(
        encode_shards,
        tokenizer,
        dataset,
        settings,
        workers=loader_workers(args.num_workers, dist),
        mixed_precision=args.mixed_precision,
    )

    if args.debug:
        with tqdm(disable=True) as progress:
            for _, codes, labels, _ in encode(shard_batches(settings, [0], args.batch_size)[:1], progress=progress):
                if not len(codes):
                    raise ValueError(f"none of the first {args.batch_size} images in {args.data_path} could be read")
                log.info(
                    f"--debug: nothing written; codes {tuple(codes.shape)} from {codes.min()} to {codes.max()}, "
                    f"labels {labels.tolist()}"
                )
        dist.close()
        return
    if args.published_layout:
        if dist.is_main:
            record_published(args.code_path, replace(settings, shard_size=SHARD_SIZE))
        dist.barrier()
        shards = list(range(settings.num_shards))
    else:
        # The first process looks for all: one that looked for itself would miss what a quicker one has written already.
        writer = CodeWriter(args.code_path, settings) if dist.is_main else None
        if writer and begun and begun.images is None:
            writer.compare_labels(dataset.images.labels)
        shards = dist.broadcast(writer.missing_shards() if writer else None)
        writer = writer or CodeWriter(args.code_path, settings)
    # Dealt out in turn, so that no process has more than one shard more than another, in a resumed run either.
    shards = shards[dist.rank :: dist.world_size]
    total = sum(len(settings.images_of(shard)) for shard in shards)
    of_all = f" (process 1 of {dist.world_size})" if dist.world_size > 1 else ""
    started = time.monotonic()
    with tqdm(total=total, unit="images", desc=f"encoding{of_all}", disable=not dist.is_main) as progress:
        batches = shard_batches(settings, shards, args.batch_size)
        for shard, codes, labels, numbers in encode(batches, progress=progress):
            if args.published_layout:
                for code, label, number in zip(codes.numpy(), labels.tolist(), numbers.tolist(), strict=True):
                    write_published(args.code_path, args.image_size, number, code, label)
            else:
                skipped = sorted(set(settings.images_of(shard)) - set(numbers.tolist()))
                writer.write_shard(shard, codes, labels, numbers, skipped)
    skipped, total = (sum(dist.gather(value)) for value in (dataset.skipped, total))
    if dist.is_main:
        seconds = time.monotonic() - started
        if total:
            log.info(f"encoded {total} images in {seconds:.1f} s, {total / seconds:.1f} images/s over all processes")
        if not args.published_layout:  # some shards may be an earlier run's
            skipped = len(dataset) - len(ShardFolder(args.code_path))
        log.info(f"{args.code_path}: codes of {len(dataset) - skipped} images, {skipped} unreadable ones skipped")
    dist.close()


def shard_batches(settings: "CodeSettings", shards: Sequence[int], batch_size: int) -> list[tuple[int, range]]:
    """(shard, data set indices) of every batch, in order.

    No batch reaches over the end of a shard: which images are encoded together, and so how sums are rounded, does not
    depend on which shards a process has to write.
    """
    batches = []
    for shard in shards:
        images = settings.images_of(shard)
        batches += [(shard, images[first : first + batch_size]) for first in range(0, len(images), batch_size)]
    return batches


def encode_shards(
    tokenizer: "Tokenizer",
    dataset: "ImageDataset",
    settings: "CodeSettings",
    batches: Sequence[tuple[int, range]],
    *,
    workers: int,
    mixed_precision: str,
    progress: "tqdm",
) -> "Iterator[tuple[int, Tensor, Tensor, Tensor]]":
    """Yields (shard, codes int32 (n, views, N), labels (n,), data set indices (n,)) of every shard in `batches`.

    One loader goes through all the shards, so that its `workers` processes start once; one shard is held at a time.
    """
    from itertools import groupby

    import torch

    from dataset.images import present_batches

    device = tokenizer.device
    present = present_batches(dataset, [images for _, images in batches], workers, device.type == "cuda")
    for shard, loaded in groupby(zip(batches, present, strict=True), key=lambda pair: pair[0][0]):
        codes = [torch.empty(0, len(settings.views), settings.tokens, dtype=torch.int32)]
        labels, numbers = ([torch.empty(0, dtype=torch.int64)] for _ in range(2))
        for (_, images), batch in loaded:
            if batch is not None:  # it is None where none of its images could be read
                pixels, label, number = batch  # (n, views, 3, H, W), (n,), (n,)
                encoded = encode_views(tokenizer, pixels.to(device, non_blocking=True), mixed_precision)
                codes.append(encoded.to("cpu", torch.int32))
                labels.append(label)
                numbers.append(number)
            progress.update(len(images))
        yield shard, torch.cat(codes), torch.cat(labels), torch.cat(numbers)


def memory_format(device: "torch.device") -> "torch.memory_format":
    """Return how an encoder's images lie in memory: channels-last on a CPU. On CUDA each group norm would undo that."""
    import torch

    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def encode_views(
    tokenizer: "Tokenizer", pixels: "Tensor", mixed_precision: str = "none", pixels_at_once: int = ENCODED_PIXELS
) -> "Tensor":
    """Codes of every view of every image. (n, views, 3, H, W) in [-1, 1] -> int64 (n, views, N), raster order.

    `mixed_precision` (none, fp16 or bf16) is the encoder's autocast; the search in the codebook is float32 always. As
    many views go through at a time as have `pixels_at_once` pixels. Raises ValueError where latents are not finite.
    """
    import torch

    from utils.training.parallel import HALF

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


def classes_by_label(args: argparse.Namespace) -> list[str] | None:
    """Return the names that decide the labels: of --classes-of, or of this extraction where it has begun. None for a new one.

    Raises ValueError where --classes-of records none.
    """
    from dataset.published import recorded_settings

    if args.classes_of is None:
        begun = recorded_settings(args.code_path, args.image_size)
        return begun.classes if begun else None
    told = recorded_settings(args.classes_of, args.image_size)
    if told is None or told.classes is None:
        raise ValueError(
            f"--classes-of {args.classes_of} is not there or records no classes: give a folder of codes of class folders"
        )
    return told.classes


def extra_settings(mixed_precision: str, reading: "Reading") -> dict:
    """Return what the index records of the encoder's precision and of how files were read."""
    return ({} if mixed_precision == "none" else {"mixed_precision": mixed_precision}) | reading.record()


def code_settings(args: argparse.Namespace, dataset: "ImageDataset", tokenizer: "Tokenizer") -> "CodeSettings":
    """What the shards' index records of the codes."""
    from dataset.augmentation import code_view_names
    from dataset.codes import CodeSettings

    return CodeSettings(
        dataset=args.dataset,
        image_size=args.image_size,
        tokens=(args.image_size // tokenizer.downsample) ** 2,
        views=code_view_names(args.ten_crop, args.flip),
        codebook_size=tokenizer.codebook_size,
        num_images=len(dataset),
        classes=dataset.classes or None,
        num_classes=len(dataset.classes) or 1,
        vq_model=tokenizer.family,
        tokenizer=tokenizer.fingerprint(),
        crop_range=args.crop_range if args.ten_crop else None,
        shard_size=args.shard_size,
        extra=extra_settings(args.mixed_precision, dataset.reading),
        images=dataset.images.identity(),
    )


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder of images")
    parser.add_argument("--code-path", required=True, help="folder to write the codes to")
    add_tokenizer_flags(parser, VQ_SIZES, required=True)
    parser.add_argument(
        "--use-ema", action="store_true", help="encode with the averaged weights where the file has them"
    )
    parser.add_argument("--dataset", default="imagenet", help="kind of image folder")
    add_reading_flags(parser)
    add_image_size_flags(parser, 256, downsample=False)
    parser.add_argument("--ten-crop", action="store_true", help="ten views an image instead of two")
    add_switch(parser, "--flip", True, "mirror images too; not where left and right matter (digits, text, scans)")
    parser.add_argument(
        "--crop-range",
        type=positive_float,
        default=1.1,
        help="ten crops are cut from a centre crop this much larger",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        help="images a batch, with all their views (in parts where those are many)",
    )
    parser.add_argument(
        "--classes-of",
        default=None,
        help="folder of codes whose classes and labels these images share, as held-out ones do: some may be absent",
    )
    parser.add_argument(
        "--class-order",
        choices=["natural", "text"],
        default="natural",
        help="of the class folders: 2 before 10, or 10 before 2 as in the published scripts",
    )
    add_encoder_precision_flag(parser)
    add_extraction_flags(parser, items="images", shard_size=4096, published="one .npy an image")
    parser.add_argument("--debug", action="store_true", help="encode one batch, print what comes out, write nothing")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
