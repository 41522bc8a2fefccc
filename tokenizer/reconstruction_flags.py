"""Flags of the reconstruction scripts, apart from the loop (tokenizer/reconstruction.py) so that `--help` need not load torch."""

import argparse

from tokenizer.vqgan.sizes import VQGAN_FROM_TAMING
from utils.cli import (
    SEED,
    add_image_size_flags,
    add_reading_flags,
    add_switch,
    flag_parser,
    nonnegative_int,
    positive_int,
)


def reconstruction_flags(
    description: str | None, *, evaluation: int | None = None, model: bool = True
) -> argparse.ArgumentParser:
    """Return the flags of every script that reconstructs a folder.

    evaluation: the default of --image-size-eval (None: --image-size). model: whether there is one to reconstruct by.
    """
    parser = flag_parser(description, added=["--precision"] if evaluation else ["--precision", "--image-size-eval"])
    parser.add_argument("--data-path", required=True, help="folder of images")
    parser.add_argument(
        "--dataset", default="imagenet", help="kind of data: imagenet, coco, pexels, openimage, t2i_image"
    )
    add_reading_flags(parser)
    add_image_size_flags(parser, 256, downsample=False)
    parser.add_argument("--sample-dir", default="reconstructions", help="where the folder of images and the rest go")
    parser.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images at once on each process")
    parser.add_argument("--global-seed", type=SEED, default=0, help="of what a model draws; most draw nothing")
    parser.add_argument(
        "--num-workers", type=nonnegative_int, default=4, help="loader processes (at most the processor's cores)"
    )
    add_switch(parser, "--npz", True, "gather the images into one .npz")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    if model:
        parser.add_argument(
            "--image-size-eval",
            type=positive_int,
            default=evaluation,
            help="pixels a side of the saved images" + ("" if evaluation else " (default: --image-size)"),
        )
        parser.add_argument(
            "--precision",
            choices=["none", "fp16", "bf16"],
            default="none",
            help="autocast of the model (none: float32)",
        )
        add_switch(parser, "--lpips", True, "LPIPS too, where the weights of VGG16 are in pretrained_models/")
    else:
        parser.set_defaults(image_size_eval=None, lpips=False)
    return parser


def demo_flags(description: str | None, suffix: str | None = None) -> argparse.ArgumentParser:
    """Return the flags of the scripts that reconstruct one image. suffix: end of its name, where the published one is fixed."""
    parser = flag_parser(description, added=[] if suffix else ["--suffix"])
    parser.add_argument("--image-path", default="assets/example.jpg", help="the image")
    add_reading_flags(parser)
    parser.add_argument("--output-dir", default="output_vq_demo", help="where the reconstruction goes")
    parser.add_argument(
        "--suffix", default=suffix, help="end of its name" + ("" if suffix else " (default: the model's)")
    )
    add_image_size_flags(parser, 512, downsample=False)
    parser.add_argument("--seed", type=SEED, default=0, help="of what the model draws; most draw nothing")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


def add_vqgan_flags(parser: argparse.ArgumentParser, default: str) -> argparse.ArgumentParser:
    """Add the flags that choose a VQGAN."""
    parser.add_argument("--vqgan", choices=list(VQGAN_FROM_TAMING), default=default, help="which VQGAN")
    parser.add_argument("--vqgan-ckpt", default=None, help="its file (default: looked for in pretrained_models/)")
    return parser


def add_vae_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that choose a VAE."""
    parser.add_argument("--vae", choices=["sdxl-vae", "sd-vae-ft-mse"], default="sd-vae-ft-mse", help="which VAE")
    parser.add_argument(
        "--vae-path", default=None, help="its diffusers folder (default: pretrained_models/, or the hub)"
    )
    parser.add_argument(
        "--posterior", choices=["mode", "sample"], default="mode", help="decode the posterior's mean, or a draw from it"
    )
    return parser


def add_consistency_decoder_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flag of the consistency decoder."""
    parser.add_argument(
        "--cd-path", default=None, help="its diffusers folder (default: pretrained_models/, or the hub)"
    )
    return parser
