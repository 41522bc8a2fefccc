"""Reconstructs a folder of images by Stable Diffusion's or SDXL's VAE, a baseline.

    torchrun --nproc_per_node=8 tokenizer/vae/reconstruction_vae_ddp.py --data-path imagenet/val --vae sd-vae-ft-mse

An image is decoded from the mean of its posterior, with --posterior sample from a draw. What it writes: see
tokenizer/reconstruction.py.
"""

import argparse

from tokenizer.reconstruction_flags import add_vae_flags, reconstruction_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.codecs import load_vae
    from tokenizer.reconstruction import reconstruct_folder

    reconstruct_folder(args, load_vae)


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    return add_vae_flags(reconstruction_flags(__doc__))


if __name__ == "__main__":
    run_script(main, flags())
