"""Encodes one image by a VQGAN of taming-transformers or latent diffusion and decodes it again.

python3 tokenizer/vqgan/taming_vqgan_demo.py --image-path photo.jpg --vqgan vqgan_openimage_f8_16384 --image-size 512
"""

import argparse

from tokenizer.reconstruction_flags import add_vqgan_flags, demo_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.codecs import load_vqgan
    from tokenizer.reconstruction import reconstruct_image

    reconstruct_image(args, load_vqgan, args.vqgan)


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    return add_vqgan_flags(demo_flags(__doc__), "vqgan_openimage_f8_16384")


if __name__ == "__main__":
    run_script(main, flags())
