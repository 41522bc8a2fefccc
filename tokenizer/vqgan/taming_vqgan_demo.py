"""Encodes one image by a VQGAN of taming-transformers or latent diffusion and decodes it again.

python3 tokenizer/vqgan/taming_vqgan_demo.py --image-path photo.jpg --vqgan vqgan_openimage_f8_16384 --image-size 512
"""

import argparse

from tokenizer.reconstruction import demo_flags
from tokenizer.vqgan.sizes import VQGAN_FROM_TAMING
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.reconstruction import VQCodec, demonstrate
    from tokenizer.vqgan.load import find_vqgan, load_vqgan
    from utils.distributed import pick_device

    device = pick_device(args.device)
    codec = VQCodec(load_vqgan(find_vqgan(args.vqgan, args.vqgan_ckpt), args.vqgan, device))
    demonstrate(args, codec, device, args.vqgan)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = demo_flags(__doc__)
    parser.add_argument(
        "--vqgan", choices=list(VQGAN_FROM_TAMING), default="vqgan_openimage_f8_16384", help="which VQGAN"
    )
    parser.add_argument("--vqgan-ckpt", default=None, help="its file (default: looked for in pretrained_models/)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
