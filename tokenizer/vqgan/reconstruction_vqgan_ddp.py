"""Reconstructs a folder of images by a VQGAN of taming-transformers or latent diffusion, a baseline.

    torchrun --nproc_per_node=8 tokenizer/vqgan/reconstruction_vqgan_ddp.py --data-path imagenet/val \\
        --vqgan vqgan_imagenet_f16_16384

Takes Lightning checkpoints as published. What it writes: see tokenizer/reconstruction.py.
"""

import argparse

from tokenizer.reconstruction import reconstruction_flags
from tokenizer.vqgan.sizes import VQGAN_FROM_TAMING
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.reconstruction import VQCodec, evaluate, folder_name
    from tokenizer.vqgan.load import find_vqgan, load_vqgan
    from utils.distributed import start

    dist = start(args.device)
    path = find_vqgan(args.vqgan, args.vqgan_ckpt)
    codec = VQCodec(load_vqgan(path, args.vqgan, dist.device))
    evaluate(args, dist, codec, name=folder_name(args, args.vqgan), weights=path)
    dist.close()


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = reconstruction_flags(__doc__)
    parser.add_argument(
        "--vqgan", choices=list(VQGAN_FROM_TAMING), default="vqgan_imagenet_f16_16384", help="which VQGAN"
    )
    parser.add_argument("--vqgan-ckpt", default=None, help="its file (default: looked for in pretrained_models/)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
