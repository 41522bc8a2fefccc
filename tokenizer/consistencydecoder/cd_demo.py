"""Encodes one image and decodes it by OpenAI's consistency decoder.

python3 tokenizer/consistencydecoder/cd_demo.py --image-path photo.jpg --image-size 512 --seed 0
"""

import argparse

from tokenizer.reconstruction import demo_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.consistencydecoder.decoder import NAME, load_consistency_decoder
    from tokenizer.reconstruction import demonstrate
    from utils.distributed import pick_device

    device = pick_device(args.device)
    codec, _ = load_consistency_decoder(args.cd_path, device, args.seed)
    demonstrate(args, codec, device, NAME)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = demo_flags(__doc__)
    parser.add_argument(
        "--cd-path", default=None, help="its diffusers folder (default: pretrained_models/, or the hub)"
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
