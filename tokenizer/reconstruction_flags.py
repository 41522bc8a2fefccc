"""The scripts that reconstruct, by kind of codec: their flags, apart from the loop so that `--help` need not load torch.

main, flags = folder_script("vae", __doc__)     # a folder of images: tokenizer/reconstruction.py
main, flags = image_script("vae", __doc__)      # one image
"""

import argparse
from collections.abc import Callable

from tokenizer.tokenizer_image.sizes import VQ_SIZES, VQGAN_FROM_TAMING
from utils.cli import (
    SEED,
    add_flag,
    add_image_size_flags,
    add_reading_flags,
    add_switch,
    add_tokenizer_flags,
    flag_parser,
    nonnegative_int,
    positive_int,
)

Script = tuple[Callable[[argparse.Namespace], None], Callable[[], argparse.ArgumentParser]]


def folder_script(kind: str, description: str | None) -> Script:
    """Return main and flags of the script that puts a folder of images through a codec of `tokenizer.codecs.LOADERS`."""

    def main(args: argparse.Namespace) -> None:
        from tokenizer.codecs import LOADERS
        from tokenizer.reconstruction import reconstruct_folder

        reconstruct_folder(args, LOADERS[kind])

    def flags() -> argparse.ArgumentParser:
        parser = flag_parser(
            description, added=["--precision"] if kind == "vq" else ["--precision", "--image-size-eval"]
        )
        parser.add_argument("--data-path", required=True, help="folder of images")
        add_flag(parser, "--dataset", None, "imagenet", "kind of data: imagenet, coco, pexels, openimage, t2i_image")
        add_reading_flags(parser)
        add_image_size_flags(parser, 256, downsample=False)
        add_flag(parser, "--sample-dir", None, "reconstructions", "where the folder of images and the rest go")
        add_flag(parser, "--per-proc-batch-size", positive_int, 32, "images at once on each process")
        add_flag(parser, "--global-seed", SEED, 0, "of what a model draws; most draw nothing")
        add_flag(parser, "--num-workers", nonnegative_int, 4, "loader processes (at most the processor's cores)")
        add_switch(parser, "--npz", True, "gather the images into one .npz")
        parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
        if kind == "reference":
            parser.set_defaults(image_size_eval=None, lpips=False)
            return parser
        help = "pixels a side of the saved images" + ("" if kind == "vq" else " (default: --image-size)")
        default = 256 if kind == "vq" else None
        parser.add_argument("--image-size-eval", type=positive_int, default=default, help=help)
        help = "autocast of the model (none: float32)"
        parser.add_argument("--precision", choices=["none", "fp16", "bf16"], default="none", help=help)
        add_switch(parser, "--lpips", True, "LPIPS too, where the weights of VGG16 are in pretrained_models/")
        add_codec_flags(parser, kind, "vqgan_imagenet_f16_16384")
        return parser

    return main, flags


def image_script(kind: str, description: str | None) -> Script:
    """Return main and flags of the script that encodes and decodes one image by a codec of `tokenizer.codecs.LOADERS`."""

    def main(args: argparse.Namespace) -> None:
        from tokenizer.codecs import LOADERS
        from tokenizer.reconstruction import reconstruct_image

        reconstruct_image(args, LOADERS[kind], args.suffix or vars(args).get(kind, kind))

    def flags() -> argparse.ArgumentParser:
        suffix = "tokenizer_image" if kind == "vq" else None
        parser = flag_parser(description, added=[] if suffix else ["--suffix"])
        parser.add_argument("--image-path", default="assets/example.jpg", help="the image")
        add_reading_flags(parser)
        parser.add_argument("--output-dir", default="output_vq_demo", help="where the reconstruction goes")
        add_flag(parser, "--suffix", None, suffix, "end of its name" + " (default: the model's)" * (not suffix))
        add_image_size_flags(parser, 512, downsample=False)
        parser.add_argument("--seed", type=SEED, default=0, help="of what the model draws; most draw nothing")
        parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
        add_codec_flags(parser, kind, "vqgan_openimage_f8_16384")
        return parser

    return main, flags


def add_codec_flags(parser: argparse.ArgumentParser, kind: str, vqgan: str) -> None:
    """Add the flags that choose a codec of a kind. vqgan: the default of --vqgan."""
    if kind == "vq":
        add_tokenizer_flags(parser, VQ_SIZES)
        add_switch(parser, "--use-ema", True, "reconstruct by the averaged weights where the file has them")
    elif kind == "vqgan":
        parser.add_argument("--vqgan", choices=list(VQGAN_FROM_TAMING), default=vqgan, help="which VQGAN")
        parser.add_argument("--vqgan-ckpt", default=None, help="its file (default: looked for in pretrained_models/)")
    elif kind == "vae":
        parser.add_argument("--vae", choices=["sdxl-vae", "sd-vae-ft-mse"], default="sd-vae-ft-mse", help="which VAE")
        add_flag(parser, "--vae-path", None, None, "its diffusers folder (default: pretrained_models/, or the hub)")
        help = "decode the posterior's mean, or a draw from it"
        parser.add_argument("--posterior", choices=["mode", "sample"], default="mode", help=help)
    else:
        add_flag(parser, "--cd-path", None, None, "its diffusers folder (default: pretrained_models/, or the hub)")
