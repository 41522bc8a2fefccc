"""Reconstructs a folder of images by OpenAI's consistency decoder, a baseline.

    torchrun --nproc_per_node=8 tokenizer/consistencydecoder/reconstruction_cd_ddp.py --data-path imagenet/val

The noise of an image is a function of --global-seed and its number. What it writes: see tokenizer/reconstruction.py.
"""

import argparse

from tokenizer.reconstruction import reconstruction_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.consistencydecoder.decoder import load_consistency_decoder
    from tokenizer.reconstruction import evaluate, folder_name
    from utils.distributed import start

    dist = start(args.device)
    with dist.main_first():
        codec, weights = load_consistency_decoder(args.cd_path, dist.device, args.global_seed)
    evaluate(args, dist, codec, name=folder_name(args, "openai-consistencydecoder"), weights=weights)
    dist.close()


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = reconstruction_flags(__doc__)
    parser.add_argument(
        "--cd-path", default=None, help="its diffusers folder (default: pretrained_models/, or the hub)"
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
