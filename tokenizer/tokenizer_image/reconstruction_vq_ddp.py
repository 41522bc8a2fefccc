"""Reconstructs a folder of images by the tokenizer: PNG files, an .npz for rFID, PSNR, SSIM, LPIPS and codebook usage.

    torchrun --nproc_per_node=8 tokenizer/tokenizer_image/reconstruction_vq_ddp.py --data-path imagenet/val \\
        --vq-ckpt vq_ds16_c2i.pt --image-size 384 --image-size-eval 256

The same command again does what is missing (see tokenizer/reconstruction.py).
"""

import argparse

from tokenizer.reconstruction import reconstruction_flags
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import add_tokenizer_flags, run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.reconstruction import VQCodec, evaluate
    from tokenizer.tokenizer_image.load import load_tokenizer
    from utils.distributed import start
    from utils.runs import find_checkpoint

    if args.vq_ckpt is None:
        raise ValueError(
            "--vq-ckpt is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
        )
    dist = start(args.device)
    with dist.main_first():
        path = find_checkpoint(args.vq_ckpt)
    tokenizer = load_tokenizer(
        path,
        vq_model=args.vq_model,
        codebook_size=args.codebook_size,
        codebook_embed_dim=args.codebook_embed_dim,
        device=dist.device,
        use_ema=args.use_ema,
    )
    name = f"{args.vq_model}-{path.stem}{'-ema' if args.use_ema else ''}-{args.dataset}-size-{args.image_size}"
    evaluate(args, dist, VQCodec(tokenizer), name=f"{name}-size-{args.image_size_eval}", weights=path)
    dist.close()


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = reconstruction_flags(__doc__, evaluation=256)
    add_tokenizer_flags(parser, VQ_SIZES)
    parser.add_argument("--use-ema", action="store_true", help="use the averaged weights where the file has them")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
