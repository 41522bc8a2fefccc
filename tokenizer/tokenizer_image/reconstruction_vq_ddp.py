"""Reconstructs a folder of images by the tokenizer: PNG files, an .npz for rFID, PSNR, SSIM, LPIPS and codebook usage.

    torchrun --nproc_per_node=8 tokenizer/tokenizer_image/reconstruction_vq_ddp.py --data-path imagenet/val \\
        --vq-ckpt vq_ds16_c2i.pt --image-size 384 --image-size-eval 256

Rerun the command to do what is missing (see tokenizer/reconstruction.py).
"""

import argparse

from tokenizer.reconstruction_flags import reconstruction_flags
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import add_switch, add_tokenizer_flags, run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.codecs import load_vq
    from tokenizer.reconstruction import reconstruct_folder

    reconstruct_folder(args, load_vq)


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = reconstruction_flags(__doc__, evaluation=256)
    add_tokenizer_flags(parser, VQ_SIZES)
    add_switch(parser, "--use-ema", True, "reconstruct by the averaged weights where the file has them")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
