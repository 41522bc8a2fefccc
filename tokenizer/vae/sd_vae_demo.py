"""Encodes one image by Stable Diffusion's or SDXL's VAE and decodes it again.

python3 tokenizer/vae/sd_vae_demo.py --image-path photo.jpg --vae sdxl-vae --image-size 512
"""

import argparse

from tokenizer.reconstruction import demo_flags
from tokenizer.vae.sd_vae import VAES
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.reconstruction import demonstrate
    from tokenizer.vae.sd_vae import load_vae
    from utils.distributed import pick_device

    device = pick_device(args.device)
    codec, _ = load_vae(args.vae, args.vae_path, device, args.posterior == "sample", args.seed)
    demonstrate(args, codec, device, args.vae)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = demo_flags(__doc__)
    parser.add_argument("--vae", choices=list(VAES), default="sd-vae-ft-mse", help="which VAE")
    parser.add_argument(
        "--vae-path", default=None, help="its diffusers folder (default: pretrained_models/, or the hub)"
    )
    parser.add_argument(
        "--posterior", choices=["mode", "sample"], default="mode", help="decode the posterior's mean, or a draw from it"
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
