"""Reconstructs a folder of images by Stable Diffusion's or SDXL's VAE, a baseline.

    torchrun --nproc_per_node=8 tokenizer/vae/reconstruction_vae_ddp.py --data-path imagenet/val --vae sd-vae-ft-mse

An image is decoded from the mean of its posterior, with --posterior sample from a draw. What it writes: see
tokenizer/reconstruction.py.
"""

import argparse

from tokenizer.reconstruction import reconstruction_flags
from tokenizer.vae.sd_vae import VAES
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.reconstruction import evaluate, folder_name
    from tokenizer.vae.sd_vae import load_vae
    from utils.distributed import start

    dist = start(args.device)
    sample = args.posterior == "sample"
    with dist.main_first():
        codec, weights = load_vae(args.vae, args.vae_path, dist.device, sample, args.global_seed)
    evaluate(args, dist, codec, name=folder_name(args, f"stabilityai-{args.vae}"), weights=weights)
    dist.close()


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = reconstruction_flags(__doc__)
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
