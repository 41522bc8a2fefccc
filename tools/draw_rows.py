"""Draws images as an animation in which they appear row by row, as a GPT in raster order makes them.

    python3 tools/draw_rows.py --gpt-ckpt quickstart/gpt --labels cook judge elf --output rows.gif

A row of pixels appears when the codes it stands on are drawn. The ending of --output decides the format: .gif, .png
(animated) or .webp.
"""

import argparse

from autoregressive.sample.flags import grid_flags
from utils.cli import add_batch_size_flag, add_flag, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from autoregressive.sample.common import build_pipeline, class_requests, labels_to_draw
    from tools.animation import animation_format, save_animation
    from utils.distributed import pick_device
    from utils.images import make_grid

    animation_format(args.output)
    pipeline, _, _ = build_pipeline(args, pick_device(args.device), args.batch_size)
    order, side = pipeline.gpt.args.identity["layout"]["name"], pipeline.gpt.layout.grid_size
    if order != "raster":
        raise ValueError(f"{args.gpt_ckpt} draws in the order {order}, not row by row")
    labels, _ = labels_to_draw(args, pipeline.gpt)
    requests = class_requests(args, pipeline.gpt, labels, range(len(labels)), args.seed)
    images = np.concatenate([drawn for _, drawn in pipeline.batches(requests, progress=True)])
    frames, height = [], images.shape[1]
    for row in range(side + 1):
        shown = images.copy()
        shown[:, height * row // side :] = 235
        grid = make_grid(shown, columns=args.columns)
        frames.append(grid.repeat(args.scale, axis=0).repeat(args.scale, axis=1))
    save_animation(frames, args.output, args.milliseconds)
    print(f"wrote {args.output}: {len(images)} images in {len(frames)} frames")


def flags() -> argparse.ArgumentParser:
    parser = grid_flags(__doc__, "rows.gif", "class")
    add_batch_size_flag(parser)
    parser.add_argument("--scale", type=positive_int, default=2, help="pixels a side of a pixel")
    add_flag(parser, "--milliseconds", positive_int, 250, "for a row; the whole stays 12 times as long")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
