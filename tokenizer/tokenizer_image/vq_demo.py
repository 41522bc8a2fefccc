"""Encodes one image and decodes it again: the reconstruction goes to --output-dir.

python3 tokenizer/tokenizer_image/vq_demo.py --image-path photo.jpg --vq-ckpt vq_ds16_c2i.pt --image-size 512
"""

import argparse

from tokenizer.reconstruction_flags import demo_flags
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import add_switch, add_tokenizer_flags, run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.codecs import load_vq
    from tokenizer.reconstruction import reconstruct_image

    reconstruct_image(args, load_vq, args.suffix)


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = demo_flags(__doc__, suffix="tokenizer_image")
    add_tokenizer_flags(parser, VQ_SIZES)
    add_switch(parser, "--use-ema", True, "reconstruct by the averaged weights where the file has them")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
