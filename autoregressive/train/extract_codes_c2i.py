"""Encodes a folder of images into codes for train_c2i.py: packed shards, or with --published-layout one file an image.

    python3 autoregressive/train/extract_codes_c2i.py --data-path my_images --code-path my_codes
    torchrun --nproc_per_node=8 autoregressive/train/extract_codes_c2i.py --data-path imagenet/train --code-path codes \\
        --vq-ckpt vq_ds16_c2i.pt --image-size 256 --ten-crop

Rerun the command to write the shards that are missing, on any number of processes.
"""

import argparse

from dataset.flags import add_encoder_precision_flag, add_extraction_flags
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    add_flag,
    add_image_size_flags,
    add_reading_flags,
    add_store_true,
    add_switch,
    add_tokenizer_flags,
    flag_parser,
    positive_float,
    positive_int,
    run_script,
    settle,
    tokenizer_beliefs,
)

RELEASED_TOKENIZER, TOKENIZER_RUNS = "vq_ds16_c2i.pt", "results_tokenizer_image"


def main(args: argparse.Namespace) -> None:
    from functools import partial

    from autoregressive.train.extraction import (
        PackedTarget,
        PublishedTarget,
        code_settings,
        encode_views,
        extract,
        memory_format,
        require_whole_tokens,
    )
    from dataset.augmentation import code_view_names, code_views
    from dataset.code_files import CodeWriter, ShardFolder, recorded_settings
    from dataset.image_build import image_dataset
    from dataset.images import present_batches
    from dataset.pixels import Reading
    from tokenizer.load import load_tokenizer
    from utils.checkpoint import read_checkpoint
    from utils.distributed import start
    from utils.logger import console_logger
    from utils.origin import listed_classes
    from utils.runs import find_checkpoint, newest_checkpoint

    if args.ten_crop and args.crop_range < 1:
        raise ValueError(f"--crop-range must be at least 1, got {args.crop_range}")
    dist = start(args.device)
    log = console_logger("dataset", dist.is_main)
    with dist.main_first():
        vq_path = find_checkpoint(args.vq_ckpt or newest_checkpoint(TOKENIZER_RUNS) or RELEASED_TOKENIZER)
    settle(args, image_size=(read_checkpoint(vq_path).args or {}).get("image_size"))
    log.info(f"the tokenizer {vq_path}, images of {args.image_size} pixels a side")
    tokenizer = load_tokenizer(vq_path, **tokenizer_beliefs(args), device=dist.device, use_ema=args.use_ema or None)
    tokenizer.to(memory_format=memory_format(dist.device))
    require_whole_tokens(tokenizer, args.image_size)
    views = {"image_size": args.image_size, "ten_crop": args.ten_crop, "crop_range": args.crop_range, "flip": args.flip}
    begun = recorded_settings(args.code_path, args.image_size)
    # The names that decide the labels: of --classes-of, or of this extraction where it has begun.
    shared = recorded_settings(args.classes_of, args.image_size) if args.classes_of else begun
    if args.classes_of and not (shared and shared.classes):
        raise ValueError(
            f"--classes-of {args.classes_of} is not there or records no classes: give a folder of codes of class folders"
        )
    dataset = image_dataset(
        args,
        transform=partial(code_views, **views),
        unreadable="omit",
        classes=shared.classes if shared else None,
        order=args.class_order,
        reading=Reading.of(args, begun.extra if begun else None),
    )
    if dataset.classes:
        log.info(f"classes: {listed_classes(dataset.classes)}")
    if args.debug:
        (batch,) = present_batches(dataset, [range(min(args.batch_size, len(dataset)))], 0, False)
        if batch is None:
            raise ValueError(f"none of the first {args.batch_size} images in {args.data_path} could be read")
        codes = encode_views(tokenizer, batch[0].to(tokenizer.device), args.mixed_precision)
        figures = f"codes {tuple(codes.shape)} from {codes.min()} to {codes.max()}, labels {batch[1].tolist()}"
        log.info(f"--debug: nothing written; {figures}")
        return dist.close()
    settings = code_settings(
        tokenizer,
        args,
        dataset.reading,
        dataset=args.dataset,
        views=code_view_names(args.ten_crop, args.flip),
        num_images=len(dataset),
        classes=dataset.classes or None,
        num_classes=len(dataset.classes) or 1,
        crop_range=args.crop_range if args.ten_crop else None,
        images=dataset.images.identity(),
    )
    if dist.is_main and begun and begun.images is None and not args.published_layout:
        CodeWriter(args.code_path, settings).compare_labels(dataset.images.labels)
    kind = PublishedTarget if args.published_layout else PackedTarget
    extract(tokenizer, dataset, [kind(args.code_path, settings)], dist, log, args)
    skipped = sum(dist.gather(dataset.skipped))
    if dist.is_main:
        if not args.published_layout:  # some shards may be an earlier run's
            skipped = len(dataset) - len(ShardFolder(args.code_path))
        log.info(f"{args.code_path}: codes of {len(dataset) - skipped} images, {skipped} unreadable ones skipped")
    dist.close()


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder of images")
    parser.add_argument("--code-path", required=True, help="folder to write the codes to")
    default = f"the newest run in {TOKENIZER_RUNS}, else the released {RELEASED_TOKENIZER}"
    add_tokenizer_flags(parser, VQ_SIZES, default=default)
    add_store_true(parser, "--use-ema", "encode with the averaged weights where the file has them")
    parser.add_argument("--dataset", default="imagenet", help="kind of image folder")
    add_reading_flags(parser)
    add_image_size_flags(parser, 256, downsample=False, of_file=True)
    parser.add_argument("--ten-crop", action="store_true", help="ten views an image instead of two")
    add_switch(parser, "--flip", True, "mirror images too; not where left and right matter (digits, text, scans)")
    add_flag(parser, "--crop-range", positive_float, 1.1, "ten crops are cut from a centre crop this much larger")
    help = "images a batch, with all their views (in parts where those are many)"
    add_flag(parser, "--batch-size", positive_int, 16, help)
    help = "folder of codes whose classes and labels these images share, as held-out ones do: some may be absent"
    add_flag(parser, "--classes-of", None, None, help)
    help = "of the class folders: 2 before 10, or 10 before 2 as in the published scripts"
    add_flag(parser, "--class-order", None, "natural", help, choices=["natural", "text"])
    add_encoder_precision_flag(parser)
    add_extraction_flags(parser, items="images", shard_size=4096, published="one .npy an image")
    parser.add_argument("--debug", action="store_true", help="encode one batch, print what comes out, write nothing")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
