"""Draws an image for each of a few prompts into one grid.

python3 autoregressive/sample/sample_t2i.py --gpt-ckpt t2i_XL_stage2_512.pt --prompt "a red lantern"

With --t5-feat-path, features that were made of --prompt-file, no T5 is needed.
"""

import argparse

from autoregressive.sample.flags import grid_flags, sampling_config
from utils.cli import add_batch_size_flag, add_flag, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from autoregressive.sample.common import build_pipeline, write_grid
    from autoregressive.sample.text import print_prompts, prompt_requests, prompts_to_draw, text_settings
    from utils.distributed import pick_device

    if len({args.height is None, args.width is None, args.height is None or args.control_image is None}) > 1:
        raise ValueError("--height and --width go together, and with --control-image: give all three, or no side")
    sides = (args.height, args.width) if args.height else None
    prompts, stored = prompts_to_draw(args)
    sampling_config(args)  # refuses settings before the models are read
    pipeline, _, _ = build_pipeline(args, pick_device(args.device), args.batch_size, text=text_settings(args))
    requests = prompt_requests(args, pipeline, stored or prompts, range(len(prompts)), args.seed, sides=sides)
    images = np.concatenate([images for _, images in pipeline.batches(requests, progress=True, sides=sides)])
    write_grid(args, pipeline.gpt, images, prompts)
    print_prompts(prompts)


def flags() -> argparse.ArgumentParser:
    parser = grid_flags(__doc__, "sample_t2i.png", "prompt")
    for side in ("height", "width"):
        help = f"pixels: the {side} of images by control images, of models of several resolutions (default: that of the model's square)"
        add_flag(parser, f"--{side}", positive_int, None, help)
    add_batch_size_flag(parser)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
