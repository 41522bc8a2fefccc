"""Draws an animation in which an image fills pass by pass, one token at a time and by windows: the same image.

    python3 tools/draw_windows.py --gpt-ckpt quickstart/gpt --labels cook judge elf --windows 0 4 16 --output windows.gif

A row of the grid for each window, a frame for each pass. Tokens that are done have their colours, drafts are pale. The
ending of --output decides the format: .gif, .png (animated) or .webp.
"""

import argparse
from typing import TYPE_CHECKING

from autoregressive.sample.flags import grid_flags
from utils.cli import add_flag, nonnegative_int, positive_int, run_script

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from autoregressive.models.layouts import Layout

EMPTY = 235


def main(args: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from autoregressive.sample.common import build_pipeline, class_requests, labels_to_draw
    from tools.animation import animation_format, save_animation
    from utils.distributed import pick_device
    from utils.images import labelled_grid

    animation_format(args.output)
    pipeline, _, _ = build_pipeline(args, pick_device(args.device), 1)
    gpt, drawn = pipeline.gpt, []
    labels, names = labels_to_draw(args, gpt)
    requests = pipeline.read(class_requests(args, gpt, labels, range(len(labels)), args.seed))
    for pipeline.window in args.windows:
        for request in requests:
            passes: list[tuple[int, Tensor]] = []
            codes = pipeline.draw([request], on_step=lambda done, so_far, p=passes: p.append((done, so_far[0].clone())))
            passes.append((gpt.layout.tokens, codes[0][gpt.layout.order]))
            drawn.append(passes)
    if any(not torch.equal(passes[-1][1], drawn[i % len(labels)][-1][1]) for i, passes in enumerate(drawn)):
        raise RuntimeError("the windows give other images than one token a pass: please report it")
    frames, wholes = [], [pipeline.decode(passes[-1][1][gpt.layout.order.argsort()][None])[0] for passes in drawn]
    rows = [(window, name) for window in args.windows for name in names]
    for number in range(max(map(len, drawn)) - 1):
        images, texts = [], []
        for passes, whole, (window, name) in zip(drawn, wholes, rows, strict=True):
            done, tokens = passes[min(number, len(passes) - 2)]
            drafts = pipeline.decode(tokens[gpt.layout.order.argsort()][None])[0]
            images.append(partly_drawn(whole, drafts, gpt.layout, done, window))
            texts.append(f"{name}, window {window}: {done} of {len(tokens)}")
        frames.append(labelled_grid(np.stack(images), texts, len(labels), side=args.side))
    save_animation(frames, args.output, args.milliseconds, exact=False)
    print(f"wrote {args.output}: {len(frames)} passes")
    for window, passes in zip(args.windows, zip(*[iter(drawn)] * len(labels), strict=True), strict=True):
        print(
            f"window {window}: {np.mean([len(each) - 1 for each in passes]):.1f} passes for {gpt.layout.tokens} tokens"
        )


def partly_drawn(whole: "np.ndarray", drafts: "np.ndarray", layout: "Layout", done: int, window: int) -> "np.ndarray":
    """Return an image of which the first `done` tokens are shown whole and those of the window after them pale. uint8 (H, W, 3)."""
    import numpy as np

    order, shown = layout.order.numpy(), np.zeros((2, layout.tokens))
    shown[0, order[:done]], shown[1, order[done : done + window]] = 1, 0.35
    scale = len(whole) // layout.grid_size
    firm, pale = shown.reshape(2, layout.grid_size, -1, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    return (firm * whole + pale * drafts + (1 - firm - pale) * EMPTY).round().astype(np.uint8)


def flags() -> argparse.ArgumentParser:
    parser = grid_flags(__doc__, "windows.gif", "class")
    add_flag(parser, "--windows", nonnegative_int, [0, 4, 16], "a row of the grid each, in tokens", nargs="+")
    parser.add_argument("--side", type=positive_int, default=128, help="pixels a side of an image, at least")
    add_flag(parser, "--milliseconds", positive_int, 150, "for a pass; the whole stays 12 times as long")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
