"""Encodes a folder of images into codes for train_c2i.py: packed shards, or with --published-layout one file an image.

    torchrun --nproc_per_node=8 autoregressive/train/extract_codes_c2i.py --data-path imagenet/train --code-path codes \\
        --vq-ckpt vq_ds16_c2i.pt --image-size 256 --ten-crop

The same command again goes on with the shards that are missing, on any number of processes.
"""

import argparse
from typing import TYPE_CHECKING

from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import add_image_size_flags, add_switch, add_tokenizer_flags, flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from dataset.codes import CodeSettings
    from dataset.images import ImageDataset
    from tokenizer.tokenizer_image.vq_model import VQModel


def main(args: argparse.Namespace) -> None:
    from functools import partial

    import torch
    from torch.utils.data import DataLoader, Subset
    from tqdm import tqdm

    from dataset.augmentation import code_views
    from dataset.build import build_dataset
    from dataset.codes import CodeWriter, write_published
    from dataset.images import collate_present
    from dataset.shards import ShardFolder
    from tokenizer.tokenizer_image.load import load_tokenizer
    from utils.distributed import start
    from utils.loading import loader_workers
    from utils.logger import console_logger
    from utils.runs import find_checkpoint

    if args.ten_crop and args.crop_range < 1:
        raise ValueError(f"--crop-range must be at least 1, got {args.crop_range}")
    dist = start(args.device)
    log = console_logger("dataset", dist.is_main)
    with dist.main_first():
        vq_path = find_checkpoint(args.vq_ckpt)
    tokenizer = load_tokenizer(
        vq_path,
        vq_model=args.vq_model,
        codebook_size=args.codebook_size,
        codebook_embed_dim=args.codebook_embed_dim,
        device=dist.device,
        use_ema=args.use_ema,
    ).to(memory_format=torch.channels_last)
    if args.image_size % tokenizer.downsample:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of {tokenizer.downsample}, the pixels a side of a token"
        )
    views = partial(
        code_views, image_size=args.image_size, ten_crop=args.ten_crop, crop_range=args.crop_range, flip=args.flip
    )
    dataset = build_dataset(args, transform=views, unreadable="omit")
    writer_settings = code_settings(args, dataset, tokenizer)

    def encode(indices: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loader = DataLoader(
            Subset(dataset, indices),
            batch_size=args.batch_size,
            num_workers=loader_workers(args.num_workers, dist),
            collate_fn=collate_present,
            pin_memory=dist.device.type == "cuda",
        )
        codes, labels, numbers = [], [], []
        for batch in loader:
            if batch is None:
                continue
            pixels, label, number = batch  # (n, views, 3, H, W), (n,), (n,)
            codes.append(encode_views(tokenizer, pixels.to(dist.device, non_blocking=True)).cpu())
            labels.append(label)
            numbers.append(number)
            bar.update(len(number))
        if not codes:
            empty = torch.empty(0, dtype=torch.int64)
            return empty.view(0, len(writer_settings.views), writer_settings.tokens), empty, empty
        return torch.cat(codes), torch.cat(labels), torch.cat(numbers)

    if args.debug:
        with tqdm(disable=True) as bar:
            codes, labels, _ = encode(range(min(args.batch_size, len(dataset))))
        log.info(
            f"--debug: nothing written; codes {tuple(codes.shape)} from {codes.min()} to {codes.max()}, labels {labels.tolist()}"
        )
        dist.close()
        return
    if args.published_layout:
        shards = range(dist.rank, writer_settings.num_shards, dist.world_size)
    else:
        if dist.is_main:
            CodeWriter(args.code_path, writer_settings)
        dist.barrier()
        writer = CodeWriter(args.code_path, writer_settings)
        shards = writer.missing_shards(dist.rank, dist.world_size)
    total = sum(len(writer_settings.images_of(shard)) for shard in shards)
    with tqdm(total=total, unit="img", desc="encoding", disable=not dist.is_main) as bar:
        for shard in shards:
            wanted = writer_settings.images_of(shard)
            codes, labels, numbers = encode(wanted)
            if args.published_layout:
                for code, label, number in zip(codes.numpy(), labels.tolist(), numbers.tolist(), strict=True):
                    write_published(args.code_path, args.image_size, number, code, label)
            else:
                skipped = sorted(set(wanted) - set(numbers.tolist()))
                writer.write_shard(shard, codes, labels, numbers, skipped)
    skipped = sum(dist.gather(dataset.skipped))
    if dist.is_main:
        if not args.published_layout:  # some shards may be an earlier run's
            skipped = len(dataset) - len(ShardFolder(args.code_path))
        log.info(f"{args.code_path}: codes of {len(dataset) - skipped} images, {skipped} unreadable ones skipped")
    dist.close()


def encode_views(tokenizer: "VQModel", pixels: "Tensor") -> "Tensor":
    """Codes of every view of every image. (n, views, 3, H, W) in [-1, 1] -> int64 (n, views, N), raster order."""
    import torch

    with torch.inference_mode():
        flat = pixels.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        _, _, (_, _, indices) = tokenizer.encode(flat)
        return indices.view(len(pixels), pixels.shape[1], -1)


def code_settings(args: argparse.Namespace, dataset: "ImageDataset", tokenizer: "VQModel") -> "CodeSettings":
    """What the shards' index records of the codes."""
    import hashlib

    from dataset.augmentation import code_view_names
    from dataset.codes import CodeSettings

    digest = hashlib.sha256(tokenizer.quantize.embedding.weight.cpu().numpy().tobytes())
    digest.update(tokenizer.encoder.conv_in.weight.cpu().numpy().tobytes())
    return CodeSettings(
        dataset=args.dataset,
        image_size=args.image_size,
        tokens=(args.image_size // tokenizer.downsample) ** 2,
        views=code_view_names(args.ten_crop, args.flip),
        codebook_size=args.codebook_size,
        num_images=len(dataset),
        classes=dataset.classes or None,
        num_classes=len(dataset.classes) or 1,
        vq_model=args.vq_model,
        tokenizer=digest.hexdigest()[:16],
        crop_range=args.crop_range if args.ten_crop else None,
        shard_size=args.shard_size,
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
    add_image_size_flags(parser, 256, downsample=False)
    parser.add_argument("--ten-crop", action="store_true", help="ten views an image instead of two")
    add_switch(parser, "--flip", True, "mirror images too; not where left and right matter (digits, text, scans)")
    parser.add_argument(
        "--crop-range", type=float, default=1.1, help="ten crops are cut from a centre crop this much larger"
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, help="images encoded at once, all their views")
    parser.add_argument(
        "--shard-size", type=positive_int, default=4096, help="images a shard, and what an interruption may cost"
    )
    parser.add_argument(
        "--published-layout", action="store_true", help="one .npy an image, as the published scripts write"
    )
    parser.add_argument(
        "--global-seed", type=int, default=0, help="kept for published command lines; encoding draws nothing"
    )
    parser.add_argument("--num-workers", type=int, default=24, help="loader processes (at most the processor's cores)")
    parser.add_argument("--debug", action="store_true", help="encode one batch, print what comes out, write nothing")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
