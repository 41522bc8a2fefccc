"""Reconstructs a folder of images by OpenAI's consistency decoder, a baseline.

    torchrun --nproc_per_node=8 tokenizer/consistencydecoder/reconstruction_cd_ddp.py --data-path imagenet/val

The noise of an image is a function of --global-seed and its number. What it writes: see tokenizer/reconstruction.py.
"""

import argparse

from tokenizer.reconstruction_flags import add_consistency_decoder_flags, reconstruction_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.codecs import load_consistency_decoder
    from tokenizer.reconstruction import reconstruct_folder

    reconstruct_folder(args, load_consistency_decoder)


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    return add_consistency_decoder_flags(reconstruction_flags(__doc__))


if __name__ == "__main__":
    run_script(main, flags())
