"""Encodes one image by Stable Diffusion's or SDXL's VAE and decodes it again.

python3 tokenizer/vae/sd_vae_demo.py --image-path photo.jpg --vae sdxl-vae --image-size 512
"""

import argparse

from tokenizer.reconstruction_flags import add_vae_flags, demo_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.codecs import load_vae
    from tokenizer.reconstruction import reconstruct_image

    reconstruct_image(args, load_vae, args.vae)


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    return add_vae_flags(demo_flags(__doc__))


if __name__ == "__main__":
    run_script(main, flags())
