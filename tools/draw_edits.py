"""Draws a figure of edits: pictures, their holes, the hole filled as a raster model sees it alone, and by particles.

    python3 tools/draw_edits.py --gpt-ckpt quickstart/gpt --drawings quickstart/drawings/held_out --labels cook judge --box 16 16 48 48

A row for each class, of its first picture. "copied": known tokens of the picture with a grey hole, one particle.
"""

import argparse
from pathlib import Path

from autoregressive.sample.flags import grid_flags, sampling_config
from utils.cli import add_flag, nonnegative_int, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np
    from PIL import Image

    from autoregressive.editing import hole_in, holed
    from autoregressive.sample.common import build_pipeline, labels_to_draw
    from utils.distributed import pick_device
    from utils.images import labelled_grid, open_picture, save_png

    settings = vars(sampling_config(args))
    pipeline, _, _ = build_pipeline(args, pick_device(args.device))
    images, texts = [], []
    for label, name in zip(*labels_to_draw(args, pipeline.gpt), strict=True):
        picture = open_picture(sorted((Path(args.drawings) / name).iterdir())[0]).convert("RGB")
        hole = hole_in(picture, box=args.box)
        grey = np.where(hole[..., None], np.uint8(128), np.asarray(picture))
        seen = holed(pipeline.image_size, pipeline.tokenizer.downsample, grey, hole)
        codes = pipeline.encode_image(Image.fromarray(grey))[0].masked_fill(seen.tokens, -1)
        copied = seen.filled(
            pipeline.decode(pipeline.generate_codes([label], known=codes[None], seed=args.seed, **settings))[0]
        )
        edited = pipeline.edit(
            picture, hole, label, n=args.num_images, seed=args.seed, particles=args.particles, **settings
        )
        images += [np.asarray(picture), grey, copied, *map(np.asarray, edited)]
        texts += [name, "its hole", "copied", *(f"seed {args.seed}, image {i}" for i in range(args.num_images))]
    save_png(labelled_grid(np.stack(images), texts, 3 + args.num_images, side=args.side), args.output)
    print(f"wrote {args.output}")


def flags() -> argparse.ArgumentParser:
    parser = grid_flags(__doc__, "edits.png", "class")
    parser.add_argument("--drawings", required=True, help="folder with a folder of pictures for each class")
    add_flag(parser, "--box", nonnegative_int, None, "the hole: left, top, right, bottom", nargs=4, required=True)
    parser.add_argument("--num-images", type=positive_int, default=3, help="fills of each picture")
    parser.add_argument("--particles", type=positive_int, default=16, help="of each fill")
    add_flag(parser, "--side", positive_int, 96, "pixels a side of a picture in the figure, at least")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
