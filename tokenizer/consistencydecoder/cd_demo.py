"""Encodes one image and decodes it by OpenAI's consistency decoder.

python3 tokenizer/consistencydecoder/cd_demo.py --image-path photo.jpg --image-size 512 --seed 0
"""

import argparse

from tokenizer.reconstruction_flags import add_consistency_decoder_flags, demo_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.codecs import load_consistency_decoder
    from tokenizer.reconstruction import reconstruct_image

    reconstruct_image(args, load_consistency_decoder, "consistency-decoder")


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    return add_consistency_decoder_flags(demo_flags(__doc__))


if __name__ == "__main__":
    run_script(main, flags())
