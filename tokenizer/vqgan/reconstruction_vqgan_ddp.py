"""Reconstructs a folder of images by a VQGAN of taming-transformers or latent diffusion, a baseline.

    torchrun --nproc_per_node=8 tokenizer/vqgan/reconstruction_vqgan_ddp.py --data-path imagenet/val \\
        --vqgan vqgan_imagenet_f16_16384

Takes Lightning checkpoints as published. What it writes: see tokenizer/reconstruction.py.
"""

import argparse

from tokenizer.reconstruction_flags import add_vqgan_flags, reconstruction_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.codecs import load_vqgan
    from tokenizer.reconstruction import reconstruct_folder

    reconstruct_folder(args, load_vqgan)


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    return add_vqgan_flags(reconstruction_flags(__doc__), "vqgan_imagenet_f16_16384")


if __name__ == "__main__":
    run_script(main, flags())
