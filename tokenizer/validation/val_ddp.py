"""Writes the centre crops of a folder of images, PNG files and an .npz: the reference that reconstructions are compared with.

    torchrun --nproc_per_node=8 tokenizer/validation/val_ddp.py --data-path imagenet/val --image-size 256

The crops are cut from the files at --image-size directly. Rerun the command to do what is missing.
"""

import argparse

from tokenizer.reconstruction_flags import reconstruction_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.reconstruction import reconstruct_folder

    reconstruct_folder(args, None)


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    return reconstruction_flags(__doc__, model=False)


if __name__ == "__main__":
    run_script(main, flags())
