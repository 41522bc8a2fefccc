"""Writes scikit-learn's handwritten digits as class folders of PNG files, for a first run without a download.

    python3 tools/make_digits.py --output quickstart/digits        # digits/train/{0..9}/*.png, digits/held_out/{0..9}/*.png

The set is 1,797 scans of 8x8 pixels with 17 grey levels (UCI, "Optical Recognition of Handwritten Digits"). They are
enlarged to 32x32; every fifth one is held out.
"""

import argparse
from pathlib import Path

from utils.cli import flag_parser, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    from utils.images import is_whole_png, save_png

    digits = load_digits()
    counts = {"train": 0, "held_out": 0}
    for i, (scan, label) in enumerate(zip(digits.images[: args.scans], digits.target)):
        split = "held_out" if i % args.held_out_every == args.held_out_every - 1 else "train"
        path = Path(args.output) / split / str(label) / f"{i:04d}.png"
        counts[split] += 1
        if is_whole_png(path):
            continue
        pixels = np.clip(scan * 255 / 16, 0, 255).round().astype(np.uint8)
        image = Image.fromarray(pixels).resize((args.image_size, args.image_size), Image.Resampling.BICUBIC)
        save_png(image.convert("RGB"), path)
    print(f"{args.output}: {counts['train']} training and {counts['held_out']} held-out digits")


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--output", required=True, help="folder to write train/ and held_out/ to")
    parser.add_argument("--image-size", type=positive_int, default=32, help="pixels a side")
    parser.add_argument("--held-out-every", type=positive_int, default=5, help="one image in this many is held out")
    parser.add_argument("--scans", type=positive_int, default=None, help="only the first so many (default: all 1,797)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
